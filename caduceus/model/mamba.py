"""The mixer: Mamba run in both directions and on one or two strands, with no tensor ever flipped.

Shapes: B batch, L length, D d_model, E inner channels, N states, K convolution width, R rank of the step projection,
S streams (1, or 2 where the model follows both strands), P directions (2, or 1 for a uni-directional model),
Q sets of in and out projections (P where untied, else 1).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caduceus.config import CaduceusConfig
from caduceus.model.observer import POSITIONS, Observer
from caduceus.model.recompute import with_operands_made_again
from caduceus.ops import PAD_DT, Context, bidirectional_conv1d, bidirectional_scan, causal_conv1d, selective_scan

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4
"""Range of the step sizes at initialisation, and the smallest allowed (Gu and Dao 2023, arXiv:2312.00752)."""


Carried = tuple[Tensor, Tensor]
"""What a run carries from one piece of a sequence into the next: the inputs that the convolution's taps still see,
(B, at most K - 1, E), and the state of the scan, (B, E, N)."""


def project(x: Tensor, weight: Tensor) -> Tensor:
    """Linear maps without bias, x (G, …, in) by weight (G, out, in), or (1, out, in) for all of x -> (G, …, out)."""
    if weight.shape[0] == 1:
        return F.linear(x, weight[0])
    return torch.bmm(x.flatten(1, -2), weight.mT).unflatten(1, x.shape[1:-1])


def with_mirrored_channels(weight: Tensor, dim: int, mirrored_stream: int, streams: int) -> Tensor:
    """`weight` for each stream, stacked on a new leading axis; the mirrored stream's copy has `dim` flipped.

    A stream that is held channel-flipped meets weights flipped along D instead, so activations never are.
    """
    return torch.stack([weight.flip(dim) if stream == mirrored_stream else weight for stream in range(streams)])


class BiMamba(nn.Module):
    """Selective state space mixer over every stream, (S, B, L, D) -> (S, B, L, D).

    Parameters of direction d (0 left-to-right, 1 right-to-left) are stacked on a leading axis. The `mirrored_stream`
    runs as the reverse complement: it has the directions exchanged, and with `mirror_channels` also D flipped at entry
    and exit, which its projections absorb. With one stream, `mirrored_stream` 1 means that it is not this one.
    """

    def __init__(
        self, config: CaduceusConfig, *, mirrored_stream: int = 1, mirror_channels: bool = False, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        self.mirrored_stream = mirrored_stream
        self.mirror_channels = mirror_channels
        self.backend = backend
        self.context: Context | None = None
        self.observer: Observer | None = None
        directions = 2 if config.bidirectional else 1
        projections = 1 if config.bidirectional_weight_tie else directions
        d_model, d_inner, rank, states = config.d_model, config.d_inner, config.dt_rank, config.d_state
        self.in_proj = nn.Parameter(torch.empty(projections, 2 * d_inner, d_model))
        self.conv_weight = nn.Parameter(torch.empty(directions, d_inner, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(directions, d_inner))
        self.x_proj = nn.Parameter(torch.empty(directions, rank + 2 * states, d_inner))
        self.dt_proj = nn.Parameter(torch.empty(directions, d_inner, rank))
        self.dt_bias = nn.Parameter(torch.empty(directions, d_inner))
        self.A_log = nn.Parameter(torch.empty(directions, d_inner, states))
        self.D = nn.Parameter(torch.empty(directions, d_inner))
        self.out_proj = nn.Parameter(torch.empty(projections, d_model, d_inner))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Published initialisation: S4D-real A, log-uniform step sizes, out projection scaled down with depth."""

        def uniform(parameter: Tensor, bound: float) -> None:
            parameter.uniform_(-bound, bound, generator=generator)

        config = self.config
        uniform(self.in_proj, config.d_model**-0.5)
        uniform(self.conv_weight, config.d_conv**-0.5)
        uniform(self.conv_bias, config.d_conv**-0.5)
        uniform(self.x_proj, config.d_inner**-0.5)
        uniform(self.dt_proj, config.dt_rank**-0.5)
        self.dt_bias.uniform_(math.log(DT_MIN), math.log(DT_MAX), generator=generator).exp_().clamp_(min=DT_FLOOR)
        self.dt_bias.add_(torch.log(-torch.expm1(-self.dt_bias)))  # inverse of softplus
        self.A_log.copy_(torch.arange(1, config.d_state + 1, device=self.A_log.device).log())
        self.D.fill_(1)
        uniform(self.out_proj, (config.d_inner * config.n_layer) ** -0.5)

    def forward(
        self,
        hidden: Tensor,
        pad_mask: Tensor | None = None,
        starts: Tensor | None = None,
        recompute_scan_inputs: bool = False,
    ) -> Tensor:
        """hidden (S, B, L, D), pad_mask (B, L) bool, true where a position is only padding of the batch; starts (B, L)
        bool, true where a packed sequence begins: nothing crosses its border in either direction. With
        `recompute_scan_inputs` the backward pass computes convolution, step sizes, B and C again, but not the scan."""
        config = self.config
        if self.observer is not None:
            self._show_steps(self.observer, hidden)
        if config.bidirectional:
            jointly = config.bidirectional_weight_tie and config.bidirectional_strategy == "add"
        else:  # the joint ops run stream 1 right-to-left, and there is no second direction to exchange it with
            jointly = self.mirrored_stream == 1 and not self._has_strand_apart(hidden)
        mix = self._mix_directions_jointly if jointly else self._mix_directions_apart
        if recompute_scan_inputs:
            return _uncompiled(mix, hidden, pad_mask, starts, with_operands_made_again)
        return mix(hidden, pad_mask, starts, _apply)

    @torch.compiler.disable
    @torch.no_grad()
    def _show_steps(self, observer: Observer, hidden: Tensor) -> None:
        """Tell step sizes and decays in the middle of the first sequence, as its first stream meets them."""
        config, middle = self.config, hidden.shape[2] // 2
        some = hidden[:, 0, max(0, middle - POSITIONS // 2) : middle + POSITIONS // 2]
        inside = slice(config.d_conv - 1, 1 - config.d_conv) if some.shape[1] > 2 * config.d_conv else slice(None)
        steps = []
        for direction in range(self.D.shape[0]):
            weight = self._for_streams(self.in_proj[direction % self.in_proj.shape[0]], -1, hidden.shape[0])
            x = F.linear(some[:1], weight[0].chunk(2)[0])
            back = (direction == 1) != (self.mirrored_stream == 0)
            u = causal_conv1d(x, self.conv_weight[direction], self.conv_bias[direction], reverse=back, backend="naive")
            dt, _, _ = self._project_scan_inputs(
                u[:, inside], self.x_proj[direction, None], self.dt_proj[direction, None], None
            )
            dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
            steps.append(F.softplus(dt[0] + self.dt_bias[direction]))
        observer.steps(torch.stack(steps), _negative_exp(self.A_log))

    def _mix_directions_jointly(
        self, hidden: Tensor, pad_mask: Tensor | None, starts: Tensor | None, apply: Callable[..., Tensor]
    ) -> Tensor:
        """Both directions share x, z and the out projection: projections and pointwise maps commute with flips."""
        x, z = self._project_in(hidden, 0, pad_mask)
        # The ops exchange the directions of stream 1. Where stream 0 is the mirrored one, exchange the parameters.
        parameters = self.conv_weight, self.conv_bias, self.x_proj, self.dt_proj, self.dt_bias, self.A_log, self.D
        if self.mirrored_stream == 0:
            parameters = [parameter.flip(0) for parameter in parameters]
        elif self._has_strand_apart(hidden):
            parameters = [parameter.clone() for parameter in parameters]
        conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = parameters
        where = {"context": self.context, "starts": starts, "backend": self.backend}
        A = _negative_exp(A_log)

        def scan_inputs() -> tuple[Tensor, ...]:
            u = bidirectional_conv1d(x, conv_weight, conv_bias, **where)
            return u, *self._project_scan_inputs(u, x_proj, dt_proj, pad_mask)

        def scan(u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
            return bidirectional_scan(u, dt, A, B, C, D, z, dt_bias, **where)

        return self._project_out(apply(scan_inputs, scan), 0)

    def _has_strand_apart(self, hidden: Tensor) -> bool:
        """Whether the other strand is on another rank.

        Gradients must then be ready in the same order on both, as DeepSpeed adds them up in the order in which they
        come: so both take the same operators, whatever their role.
        """
        return self.config.rcps and hidden.shape[0] == 1

    def _mix_directions_apart(
        self, hidden: Tensor, pad_mask: Tensor | None, starts: Tensor | None, apply: Callable[..., Tensor]
    ) -> Tensor:
        """Directions with projections of their own, or joined by multiplication."""
        directions = range(2 if self.config.bidirectional else 1)
        outputs = [self._mix_direction(hidden, direction, pad_mask, starts, apply) for direction in directions]
        if len(outputs) == 1:
            return outputs[0]
        forward, backward = outputs
        return forward + backward if self.config.bidirectional_strategy == "add" else forward * backward

    def _mix_direction(
        self,
        hidden: Tensor,
        direction: int,
        pad_mask: Tensor | None,
        starts: Tensor | None,
        apply: Callable[..., Tensor],
    ) -> Tensor:
        projection = direction % self.in_proj.shape[0]
        x, z = self._project_in(hidden, projection, pad_mask)
        reverse = [(direction == 1) != (stream == self.mirrored_stream) for stream in range(hidden.shape[0])]
        where = {"context": self.context, "starts": starts, "backend": self.backend}
        conv_weight, conv_bias = self.conv_weight[direction], self.conv_bias[direction]
        x_proj, dt_proj = self.x_proj[direction, None], self.dt_proj[direction, None]
        A, D, dt_bias = _negative_exp(self.A_log[direction]), self.D[direction], self.dt_bias[direction]

        def scan_inputs() -> tuple[Tensor, ...]:
            u = torch.stack(
                [
                    causal_conv1d(stream, conv_weight, conv_bias, reverse=back, **where)
                    for stream, back in zip(x.unbind(0), reverse, strict=True)
                ]
            )
            return u, *self._project_scan_inputs(u, x_proj, dt_proj, pad_mask)

        def scan(u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
            streams = zip(*(tensor.unbind(0) for tensor in (u, dt, B, C, z)), reverse, strict=True)
            return torch.stack(
                [
                    selective_scan(u, dt, A, B, C, D, z, dt_bias, reverse=back, **where)
                    for u, dt, B, C, z, back in streams
                ]
            )

        return self._project_out(apply(scan_inputs, scan), projection)

    def mix_piece(self, hidden: Tensor, backwards: bool, carried: list[Carried | None]) -> tuple[Tensor, list]:
        """What the runs that go one way make of a piece of longer sequences, and what they carry into the next piece.

        hidden (S, B, l, D); `carried` by stream, None before the first piece. Zeros for a stream without such a run.
        With `bidirectional_strategy: add` both ways add up to the mixer's output, else they are to be multiplied.
        """
        mixed, handed_on = torch.zeros_like(hidden), list(carried)
        for stream, rows in enumerate(hidden):
            direction = int(backwards != (stream == self.mirrored_stream))
            if direction < len(self.conv_weight):
                mixed[stream], handed_on[stream] = self._mix_run(rows, stream, direction, backwards, carried[stream])
        return mixed, handed_on

    def _mix_run(
        self, rows: Tensor, stream: int, direction: int, backwards: bool, carried: Carried | None
    ) -> tuple[Tensor, Carried]:
        """One stream of a piece in one direction: rows (B, l, D) -> (B, l, D)."""
        projection, where = direction % self.in_proj.shape[0], {"reverse": backwards, "backend": self.backend}
        in_proj = self._for_streams(self.in_proj[projection], -1, stream + 1)[-1]
        out_proj = self._for_streams(self.out_proj[projection], 0, stream + 1)[-1]
        x, z = (F.linear(rows, weight) for weight in in_proj.chunk(2))
        taps, state = carried or (x[:, :0], None)
        seen = torch.cat([x, taps] if backwards else [taps, x], 1)
        first = 0 if backwards else taps.shape[1]
        u = causal_conv1d(seen, self.conv_weight[direction], self.conv_bias[direction], **where)
        u = u.narrow(1, first, x.shape[1])
        dt, B, C = self._project_scan_inputs(u, self.x_proj[direction, None], self.dt_proj[direction, None], None)
        A, D, dt_bias = _negative_exp(self.A_log[direction]), self.D[direction], self.dt_bias[direction]
        y, state = selective_scan(u, dt, A, B, C, D, z, dt_bias, initial_state=state, return_final_state=True, **where)
        width = min(self.config.d_conv - 1, seen.shape[1])
        taps = seen.narrow(1, 0 if backwards else seen.shape[1] - width, width).clone()
        return F.linear(y, out_proj), (taps, state)

    def _project_in(self, hidden: Tensor, projection: int, pad_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """x and z, (S, B, L, E) each. Two products instead of one give two contiguous results."""
        weight = self._for_streams(self.in_proj[projection], -1, hidden.shape[0])
        x_weight, z_weight = weight.chunk(2, dim=1)
        x = project(hidden, x_weight)
        if pad_mask is not None:
            x = x.masked_fill(pad_mask[..., None], 0)
        return x, project(hidden, z_weight)

    def _project_scan_inputs(
        self, u: Tensor, x_proj: Tensor, dt_proj: Tensor, pad_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dt before bias and softplus, (…, E), and B, C (…, N) of u (…, E)."""
        states = self.config.d_state
        dt, B, C = project(u, x_proj).split([self.config.dt_rank, states, states], dim=-1)
        dt = project(dt, dt_proj)
        if pad_mask is not None:
            dt = dt.masked_fill(pad_mask[..., None], PAD_DT)
        return dt, B, C

    def _project_out(self, y: Tensor, projection: int) -> Tensor:
        return project(y, self._for_streams(self.out_proj[projection], 0, y.shape[0]))

    def _for_streams(self, weight: Tensor, dim: int, streams: int) -> Tensor:
        if not self.mirror_channels:
            return weight[None]
        return with_mirrored_channels(weight, dim, self.mirrored_stream, streams)


def _negative_exp(A_log: Tensor) -> Tensor:
    return -A_log.to(torch.promote_types(A_log.dtype, torch.float32)).exp()


def _apply(scan_inputs: Callable[[], tuple[Tensor, ...]], scan: Callable[..., Tensor]) -> Tensor:
    return scan(*scan_inputs())


@torch.compiler.disable  # hooks on saved tensors are not for a compiled graph
def _uncompiled(mix: Callable[..., Tensor], *arguments: Tensor | Callable | None) -> Tensor:
    return mix(*arguments)
