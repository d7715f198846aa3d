"""Mamba (Gu and Dao 2023, arXiv:2312.00752) in both directions and on one or two strands, with no tensor ever flipped.

Shapes as in `caduceus.model.mixer`; R rank of the step projection.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caduceus.config import CaduceusConfig
from caduceus.model.mixer import Apply, Carried, Mixer, init_step_sizes, init_uniform, negative_exp, project
from caduceus.model.observer import POSITIONS, Observer
from caduceus.model.precision import product_dtype
from caduceus.model.projections import project_alone, project_beside, project_twice
from caduceus.ops import (
    PAD_DT,
    bidirectional_conv1d,
    bidirectional_scan,
    causal_conv1d,
    selective_scan,
)
from caduceus.ops.backends import kernels_of_gpu


class BiMamba(Mixer):
    """The mixer of Mamba, in which every state has its own decay rate."""

    def __init__(
        self, config: CaduceusConfig, *, mirrored_stream: int = 1, mirror_channels: bool = False, backend: str = "auto"
    ) -> None:
        super().__init__(config, mirrored_stream=mirrored_stream, mirror_channels=mirror_channels, backend=backend)
        directions, projections = self.directions, self.projections
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
        """Initialise as published: S4D-real A, log-uniform step sizes, out projection scaled down with depth."""
        config, uniform = self.config, partial(init_uniform, generator=generator)
        uniform(self.in_proj, config.d_model**-0.5)
        uniform(self.conv_weight, config.d_conv**-0.5)
        uniform(self.conv_bias, config.d_conv**-0.5)
        uniform(self.x_proj, config.d_inner**-0.5)
        uniform(self.dt_proj, config.dt_rank**-0.5)
        init_step_sizes(self.dt_bias, generator)
        self.A_log.copy_(torch.arange(1, config.d_state + 1, device=self.A_log.device).log())
        self.D.fill_(1)
        uniform(self.out_proj, (config.d_inner * config.n_layer) ** -0.5)

    @torch.compiler.disable
    @torch.no_grad()
    def _show_steps(self, observer: Observer, hidden: Tensor) -> None:
        """Report step sizes and decays in the middle of the first sequence, for its first stream."""
        config, middle = self.config, hidden.shape[2] // 2
        some = hidden[:, 0, max(0, middle - POSITIONS // 2) : middle + POSITIONS // 2]
        inside = slice(config.d_conv - 1, 1 - config.d_conv) if some.shape[1] > 2 * config.d_conv else slice(None)
        steps = []
        for direction in range(self.D.shape[0]):
            weight = self._for_streams(self.in_proj[direction % self.in_proj.shape[0]], -1, hidden.shape[0])
            x = F.linear(some[:1], weight[0].chunk(2)[0])
            back = (direction == 1) != (self.mirrored_stream == 0)
            u = causal_conv1d(x, self.conv_weight[direction], self.conv_bias[direction], reverse=back, backend="naive")
            _, dt, _, _ = self._project_scan_inputs(
                u[:, inside], self.x_proj[direction, None], self.dt_proj[direction, None], None
            )
            dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
            steps.append(F.softplus(dt[0] + self.dt_bias[direction]))
        observer.steps(torch.stack(steps), negative_exp(self.A_log))

    def _mix_directions_jointly(
        self, hidden: Tensor, pad_mask: Tensor | None, starts: Tensor | None, apply: Apply
    ) -> Tensor:
        """Mix with x, z and the out projection shared by both directions: projections and pointwise maps commute with
        flips.
        """
        x, z = self._project_in(hidden, 0, pad_mask)
        parameters = self.conv_weight, self.conv_bias, self.x_proj, self.dt_proj, self.dt_bias, self.A_log, self.D
        conv_weight, conv_bias, x_proj, dt_proj, dt_bias, A_log, D = self._parameters_by_role(hidden, *parameters)
        where = {"context": self.context, "starts": starts, "backend": self.backend}
        A = negative_exp(A_log)

        def scan_inputs() -> tuple[Tensor, ...]:
            u = bidirectional_conv1d(x, conv_weight, conv_bias, **where)
            return self._project_scan_inputs(u, x_proj, dt_proj, pad_mask)

        def scan(u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
            return bidirectional_scan(u, dt, A, B, C, D, z, dt_bias, keep=self.keeps_states, **where)

        return self._project_out(apply(scan_inputs, scan), 0)

    def _mix_direction(
        self,
        hidden: Tensor,
        direction: int,
        pad_mask: Tensor | None,
        starts: Tensor | None,
        apply: Apply,
    ) -> Tensor:
        projection = direction % self.in_proj.shape[0]
        x, z = self._project_in(hidden, projection, pad_mask)
        reverse = self._runs_backwards(hidden, direction)
        where = {"context": self.context, "starts": starts, "backend": self.backend}
        conv_weight, conv_bias = self.conv_weight[direction], self.conv_bias[direction]
        x_proj, dt_proj = self.x_proj[direction, None], self.dt_proj[direction, None]
        A, D, dt_bias = negative_exp(self.A_log[direction]), self.D[direction], self.dt_bias[direction]

        def scan_inputs() -> tuple[Tensor, ...]:
            u = torch.stack(
                [
                    causal_conv1d(stream, conv_weight, conv_bias, reverse=back, **where)
                    for stream, back in zip(x.unbind(0), reverse, strict=True)
                ]
            )
            return self._project_scan_inputs(u, x_proj, dt_proj, pad_mask)

        def scan(u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
            streams = zip(*(tensor.unbind(0) for tensor in (u, dt, B, C, z)), reverse, strict=True)
            return torch.stack(
                [
                    selective_scan(u, dt, A, B, C, D, z, dt_bias, reverse=back, keep=self.keeps_states, **where)
                    for u, dt, B, C, z, back in streams
                ]
            )

        return self._project_out(apply(scan_inputs, scan), projection)

    def _mix_run(
        self, rows: Tensor, stream: int, direction: int, backwards: bool, carried: Carried | None
    ) -> tuple[Tensor, Carried]:
        """Mix one stream of a piece in one direction: rows (B, l, D) -> (B, l, D)."""
        projection, where = direction % self.in_proj.shape[0], {"reverse": backwards, "backend": self.backend}
        in_proj = self._for_streams(self.in_proj[projection], -1, stream + 1)[-1]
        out_proj = self._for_streams(self.out_proj[projection], 0, stream + 1)[-1]
        x, z = (F.linear(rows, weight) for weight in in_proj.chunk(2))
        taps, state = carried or (None, None)
        weight, bias = self.conv_weight[direction], self.conv_bias[direction]
        u, taps = self._convolved_piece(x, backwards, taps, lambda seen: causal_conv1d(seen, weight, bias, **where))
        u, dt, B, C = self._project_scan_inputs(u, self.x_proj[direction, None], self.dt_proj[direction, None], None)
        A, D, dt_bias = negative_exp(self.A_log[direction]), self.D[direction], self.dt_bias[direction]
        y, state = selective_scan(u, dt, A, B, C, D, z, dt_bias, initial_state=state, return_final_state=True, **where)
        return F.linear(y, out_proj), (taps, state)

    def _project_in(self, hidden: Tensor, projection: int, pad_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """x and z, (S, B, L, E) each. Two products instead of one give two contiguous results."""
        weight = self._for_streams(self.in_proj[projection], -1, hidden.shape[0])
        x_weight, z_weight = weight.chunk(2, dim=1)
        if self._sums_in_products(hidden):
            x, z = project_twice(hidden, x_weight, z_weight)
        else:
            x, z = project(hidden, x_weight), project(hidden, z_weight)
        if pad_mask is not None:
            x = x.masked_fill(pad_mask[..., None], 0)
        return x, z

    def _project_scan_inputs(
        self, u: Tensor, x_proj: Tensor, dt_proj: Tensor, pad_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """u (…, E) for the scan, dt before bias and softplus, (…, E), and B, C (…, N)."""
        states, sums_in_products = self.config.d_state, self._sums_in_products(u)
        u, projected = project_beside(u, x_proj) if sums_in_products else (u, project(u, x_proj))
        dt, B, C = projected.split([self.config.dt_rank, states, states], dim=-1)
        dt = project_alone(dt, dt_proj) if sums_in_products else project(dt, dt_proj)
        if pad_mask is not None:
            dt = dt.masked_fill(pad_mask[..., None], PAD_DT)
        return u, dt, B, C

    def _sums_in_products(self, x: Tensor) -> bool:
        """Whether projections of x use the backward passes for GPUs (`caduceus.model.projections`)."""
        return kernels_of_gpu(self.backend, x) is not None and x.dtype == product_dtype(x)
