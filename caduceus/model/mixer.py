"""The common part of all mixers: the mirrored stream, how directions are joined, and mixing a sequence piece by piece.

Shapes: B batch, L length, D d_model, E inner channels, N states, K convolution width, S streams (1, or 2 where the
model follows both strands), P directions (2, or 1 for a uni-directional model), Q sets of in and out projections (P
where untied, else 1).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caduceus.config import CaduceusConfig
from caduceus.model.observer import Observer
from caduceus.model.recompute import with_operands_made_again
from caduceus.ops import Context

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4
"""Range of the step sizes at initialisation, and the smallest allowed (Gu and Dao 2023, arXiv:2312.00752)."""

Apply = Callable[..., Tensor]
"""A function that calls a scan with its inputs: `apply_scan`, or one that recomputes the inputs in the backward pass.
"""
Carried = tuple[Tensor, Tensor]
"""What one direction passes from one piece of a sequence to the next: the last inputs that the convolution still sees,
(B, at most K - 1, channels), and the state of the scan, (B, …).
"""


def project(x: Tensor, weight: Tensor) -> Tensor:
    """Linear maps without bias: x (G, …, in) and weight (G, out, in), or (1, out, in) for all of x -> (G, …, out)."""
    if weight.shape[0] == 1:
        return F.linear(x, weight[0])
    return torch.bmm(x.flatten(1, -2), weight.mT).unflatten(1, x.shape[1:-1])


def with_mirrored_channels(weight: Tensor, dim: int, mirrored_stream: int, streams: int) -> Tensor:
    """`weight` for each stream, stacked on a new leading axis; the mirrored stream's copy has `dim` flipped.

    A stream that is held channel-flipped meets weights flipped along D instead, so activations never are.
    """
    return torch.stack([weight.flip(dim) if stream == mirrored_stream else weight for stream in range(streams)])


def negative_exp(A_log: Tensor) -> Tensor:
    """A, in at least fp32."""
    return -A_log.to(torch.promote_types(A_log.dtype, torch.float32)).exp()


def init_uniform(parameter: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Fill a parameter uniformly from [-bound, bound]."""
    parameter.uniform_(-bound, bound, generator=generator)


def init_step_sizes(dt_bias: Tensor, generator: torch.Generator | None) -> None:
    """Draw step sizes log-uniformly, and store the values that softplus maps to them."""
    dt_bias.uniform_(math.log(DT_MIN), math.log(DT_MAX), generator=generator).exp_().clamp_(min=DT_FLOOR)
    dt_bias.add_(torch.log(-torch.expm1(-dt_bias)))  # the inverse of softplus


class Mixer(nn.Module, ABC):
    """Selective state space mixer over every stream, (S, B, L, D) -> (S, B, L, D).

    Parameters of direction d (0 left-to-right, 1 right-to-left) are stacked on a leading axis. The `mirrored_stream`
    runs as the reverse complement: it has the directions exchanged, and with `mirror_channels` also D flipped at entry
    and exit, which its projections absorb. With one stream, `mirrored_stream` 1 means that it is not this one.

    Subclasses have `in_proj` (Q, …, D), `out_proj` (Q, D, E), `conv_weight` (P, …), and the abstract methods.
    """

    in_proj: nn.Parameter
    out_proj: nn.Parameter
    conv_weight: nn.Parameter

    def __init__(
        self, config: CaduceusConfig, *, mirrored_stream: int = 1, mirror_channels: bool = False, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.config = config
        self.mirrored_stream = mirrored_stream
        self.mirror_channels = mirror_channels
        self.backend = backend
        self.context: Context | None = None
        self.keeps_states = False
        self.observer: Observer | None = None
        self.directions = 2 if config.bidirectional else 1
        self.projections = 1 if config.bidirectional_weight_tie else self.directions

    @abstractmethod
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise the parameters as published."""

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
        else:  # the joint ops run stream 1 right-to-left, and there is no second direction to exchange
            jointly = self.mirrored_stream == 1 and not self._has_strand_apart(hidden)
        mix = self._mix_directions_jointly if jointly else self._mix_directions_apart
        if recompute_scan_inputs:
            return _uncompiled(mix, hidden, pad_mask, starts, with_operands_made_again)
        return mix(hidden, pad_mask, starts, apply_scan)

    @abstractmethod
    def _show_steps(self, observer: Observer, hidden: Tensor) -> None:
        """Report step sizes and decays in the middle of the first sequence, for its first stream."""

    @abstractmethod
    def _mix_directions_jointly(
        self, hidden: Tensor, pad_mask: Tensor | None, starts: Tensor | None, apply: Apply
    ) -> Tensor:
        """Mix with projections that both directions share; like pointwise maps, they commute with flips."""

    @abstractmethod
    def _mix_direction(
        self, hidden: Tensor, direction: int, pad_mask: Tensor | None, starts: Tensor | None, apply: Apply
    ) -> Tensor:
        """Mix in one direction, with its own out projection."""

    @abstractmethod
    def _mix_run(
        self, rows: Tensor, stream: int, direction: int, backwards: bool, carried: Carried | None
    ) -> tuple[Tensor, Carried]:
        """Mix one stream of a piece in one direction: rows (B, l, D) -> (B, l, D)."""

    def _has_strand_apart(self, hidden: Tensor) -> bool:
        """Whether the other strand is on another rank.

        Gradients must then be ready in the same order on both ranks, as DeepSpeed adds them up in the order in which
        they come: so both use the same operators, whatever their role.
        """
        return self.config.rcps and hidden.shape[0] == 1

    def _mix_directions_apart(
        self, hidden: Tensor, pad_mask: Tensor | None, starts: Tensor | None, apply: Apply
    ) -> Tensor:
        """Mix with separate projections for each direction, or with directions joined by multiplication."""
        directions = range(2 if self.config.bidirectional else 1)
        outputs = [self._mix_direction(hidden, direction, pad_mask, starts, apply) for direction in directions]
        if len(outputs) == 1:
            return outputs[0]
        forward, backward = outputs
        return forward + backward if self.config.bidirectional_strategy == "add" else forward * backward

    def mix_piece(self, hidden: Tensor, backwards: bool, carried: list[Carried | None]) -> tuple[Tensor, list]:
        """Mix a piece of longer sequences from left to right, or `backwards`. Returns the output, and what to carry to
        the next piece.

        hidden (S, B, l, D); `carried`: by stream, None before the first piece. A stream that does not go this way gets
        zeros. With `bidirectional_strategy: add` the outputs of both ways add up to the mixer's output, otherwise they
        must be multiplied.
        """
        mixed, handed_on = torch.zeros_like(hidden), list(carried)
        for stream, rows in enumerate(hidden):
            direction = int(backwards != (stream == self.mirrored_stream))
            if direction < len(self.conv_weight):
                mixed[stream], handed_on[stream] = self._mix_run(rows, stream, direction, backwards, carried[stream])
        return mixed, handed_on

    def _parameters_by_role(self, hidden: Tensor, *parameters: Tensor) -> list[Tensor]:
        """Parameters (P, …) for ops that exchange the directions of stream 1.

        Where stream 0 is the mirrored one, the parameters are exchanged instead.
        """
        if self.mirrored_stream == 0:
            return [parameter.flip(0) for parameter in parameters]
        if self._has_strand_apart(hidden):
            return [parameter.clone() for parameter in parameters]
        return list(parameters)

    def _runs_backwards(self, hidden: Tensor, direction: int) -> list[bool]:
        """For each stream, whether it uses a direction's parameters right-to-left."""
        return [(direction == 1) != (stream == self.mirrored_stream) for stream in range(hidden.shape[0])]

    def _convolved_piece(
        self, x: Tensor, backwards: bool, taps: Tensor | None, convolve: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The convolution of a piece x (B, l, channels) after the inputs `taps`, and the `taps` for the next piece."""
        taps = x[:, :0] if taps is None else taps
        seen = torch.cat([x, taps] if backwards else [taps, x], 1)
        u = convolve(seen).narrow(1, 0 if backwards else taps.shape[1], x.shape[1])
        width = min(self.config.d_conv - 1, seen.shape[1])
        return u, seen.narrow(1, 0 if backwards else seen.shape[1] - width, width).clone()

    def _project_out(self, y: Tensor, projection: int) -> Tensor:
        return project(y, self._for_streams(self.out_proj[projection], 0, y.shape[0]))

    def _for_streams(self, weight: Tensor, dim: int, streams: int) -> Tensor:
        if not self.mirror_channels:
            return weight[None]
        return with_mirrored_channels(weight, dim, self.mirrored_stream, streams)


def apply_scan(scan_inputs: Callable[[], tuple[Tensor, ...]], scan: Apply) -> Tensor:
    """Call the scan with its inputs, all of which autograd keeps."""
    return scan(*scan_inputs())


@torch.compiler.disable  # hooks on saved tensors cannot be in a compiled graph
def _uncompiled(mix: Apply, *arguments: Tensor | Apply | None) -> Tensor:
    return mix(*arguments)
