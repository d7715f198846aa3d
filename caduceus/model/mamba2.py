"""Mamba-2 (Dao and Gu 2024, arXiv:2405.21060) in both directions and on one or two strands, as in PlantCAD2.

The in projection gives step sizes, B and C, so directions that share it share these too; each direction has its own
convolution, dt_bias, A, D and gated norm. Shapes as in `caduceus.model.mixer`; H heads of W channels (headdim), E = H
W, and F = E + 2 N channels of the convolution.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from caduceus.config import CaduceusConfig
from caduceus.model.mixer import Apply, Carried, Mixer, init_step_sizes, init_uniform, negative_exp, project
from caduceus.model.observer import POSITIONS, Observer
from caduceus.ops import PAD_DT, bidirectional_conv1d, causal_conv1d
from caduceus.ops.mamba2 import bidirectional_ssd_scan, gated_norm, ssd_scan

A_RANGE = (1, 16)
"""Smallest and largest -A at initialisation."""


class BiMamba2(Mixer):
    """The mixer of Mamba-2, in which all states of a head have the same decay."""

    def __init__(
        self, config: CaduceusConfig, *, mirrored_stream: int = 1, mirror_channels: bool = False, backend: str = "auto"
    ) -> None:
        super().__init__(config, mirrored_stream=mirrored_stream, mirror_channels=mirror_channels, backend=backend)
        directions, projections = self.directions, self.projections
        d_model, d_inner, heads = config.d_model, config.d_inner, config.heads
        channels = d_inner + 2 * config.d_state
        self.in_proj = nn.Parameter(torch.empty(projections, d_inner + channels + heads, d_model))
        self.conv_weight = nn.Parameter(torch.empty(directions, channels, config.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(directions, channels))
        self.dt_bias = nn.Parameter(torch.empty(directions, heads))
        self.A_log = nn.Parameter(torch.empty(directions, heads))
        self.D = nn.Parameter(torch.empty(directions, heads))
        self.norm_weight = nn.Parameter(torch.empty(directions, d_inner))
        self.out_proj = nn.Parameter(torch.empty(projections, d_model, d_inner))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initialise as published: uniform A, log-uniform step sizes, out projection scaled down with depth."""
        config, uniform = self.config, partial(init_uniform, generator=generator)
        uniform(self.in_proj, config.d_model**-0.5)
        uniform(self.conv_weight, config.d_conv**-0.5)
        uniform(self.conv_bias, config.d_conv**-0.5)
        init_step_sizes(self.dt_bias, generator)
        self.A_log.uniform_(*A_RANGE, generator=generator).log_()
        self.D.fill_(1)
        self.norm_weight.fill_(1)
        uniform(self.out_proj, (config.d_inner * config.n_layer) ** -0.5)

    @torch.compiler.disable
    @torch.no_grad()
    def _show_steps(self, observer: Observer, hidden: Tensor) -> None:
        middle = hidden.shape[2] // 2
        some = hidden[:1, 0, max(0, middle - POSITIONS // 2) : middle + POSITIONS // 2]
        steps = []
        for direction in range(self.directions):
            weight = self._for_streams(self.in_proj[direction % self.projections], -1, hidden.shape[0])[0]
            dt = F.linear(some, weight[-self.config.heads :])[0]
            steps.append(F.softplus(dt.to(torch.promote_types(dt.dtype, torch.float32)) + self.dt_bias[direction]))
        observer.steps(torch.stack(steps), negative_exp(self.A_log)[..., None])

    def _mix_directions_jointly(
        self, hidden: Tensor, pad_mask: Tensor | None, starts: Tensor | None, apply: Apply
    ) -> Tensor:
        z, fed, dt = self._project_in(hidden, 0, pad_mask)
        parameters = self.conv_weight, self.conv_bias, self.dt_bias, self.A_log, self.D, self.norm_weight
        conv_weight, conv_bias, dt_bias, A_log, D, norm = self._parameters_by_role(hidden, *parameters)
        where = {"context": self.context, "starts": starts, "backend": self.backend}
        A = negative_exp(A_log)

        def scan_inputs() -> tuple[Tensor, ...]:
            return self._split(bidirectional_conv1d(fed, conv_weight, conv_bias, **where))

        def scan(x: Tensor, B: Tensor, C: Tensor) -> Tensor:
            steps = dt[None].expand(self.directions, *dt.shape)
            y = bidirectional_ssd_scan(x, steps, A, B, C, D, dt_bias, **where)
            return gated_norm(y.flatten(-2), z, norm, backend=self.backend)

        return self._project_out(apply(scan_inputs, scan), 0)

    def _mix_direction(
        self, hidden: Tensor, direction: int, pad_mask: Tensor | None, starts: Tensor | None, apply: Apply
    ) -> Tensor:
        projection = direction % self.projections
        z, fed, dt = self._project_in(hidden, projection, pad_mask)
        reverse = self._runs_backwards(hidden, direction)
        where = {"context": self.context, "starts": starts, "backend": self.backend}
        weight, bias = self.conv_weight[direction], self.conv_bias[direction]
        A, D, dt_bias = negative_exp(self.A_log[direction]), self.D[direction], self.dt_bias[direction]

        def scan_inputs() -> tuple[Tensor, ...]:
            streams = zip(fed.unbind(0), reverse, strict=True)
            runs = [causal_conv1d(x, weight, bias, reverse=back, **where) for x, back in streams]
            return self._split(torch.stack(runs))

        def scan(x: Tensor, B: Tensor, C: Tensor) -> Tensor:
            streams = zip(*(tensor.unbind(0) for tensor in (x, dt, B, C)), reverse, strict=True)
            runs = [ssd_scan(x, dt, A, B, C, D, dt_bias, reverse=back, **where) for x, dt, B, C, back in streams]
            y, norm = torch.stack(runs).flatten(-2)[None], self.norm_weight[direction, None]
            return gated_norm(y, z, norm, backend=self.backend)

        return self._project_out(apply(scan_inputs, scan), projection)

    def _mix_run(
        self, rows: Tensor, stream: int, direction: int, backwards: bool, carried: Carried | None
    ) -> tuple[Tensor, Carried]:
        projection, where = direction % self.projections, {"reverse": backwards, "backend": self.backend}
        in_proj = self._for_streams(self.in_proj[projection], -1, stream + 1)[-1]
        out_proj = self._for_streams(self.out_proj[projection], 0, stream + 1)[-1]
        z, fed, dt = F.linear(rows, in_proj).split(self._sizes(), -1)
        taps, state = carried or (None, None)
        weight, bias = self.conv_weight[direction], self.conv_bias[direction]
        u, taps = self._convolved_piece(fed, backwards, taps, lambda seen: causal_conv1d(seen, weight, bias, **where))
        x, B, C = self._split(u)
        A, D, dt_bias = negative_exp(self.A_log[direction]), self.D[direction], self.dt_bias[direction]
        y, state = ssd_scan(x, dt, A, B, C, D, dt_bias, initial_state=state, return_final_state=True, **where)
        norm = self.norm_weight[direction, None]
        gated = gated_norm(y.flatten(-2)[None, None], z[None], norm, backend=self.backend)
        return F.linear(gated[0], out_proj), (taps, state)

    def _sizes(self) -> list[int]:
        """Sizes of the parts of the in projection, in order: z; x, B and C, which are convolved; and the step sizes."""
        config = self.config
        return [config.d_inner, config.d_inner + 2 * config.d_state, config.heads]

    def _project_in(self, hidden: Tensor, projection: int, pad_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """z (S, B, L, E), x, B and C together (S, B, L, F), and dt before bias and softplus (S, B, L, H)."""
        weight = self._for_streams(self.in_proj[projection], -1, hidden.shape[0])
        z, fed, dt = (project(hidden, part) for part in weight.split(self._sizes(), dim=1))
        if pad_mask is not None:
            fed = fed.masked_fill(pad_mask[..., None], 0)
            dt = dt.masked_fill(pad_mask[..., None], PAD_DT)
        return z, fed, dt

    def _split(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (…, H, W), B and C (…, N), from the output of the convolution."""
        states = self.config.d_state
        x, B, C = u.split([self.config.d_inner, states, states], dim=-1)
        return x.unflatten(-1, (self.config.heads, self.config.headdim)), B, C
