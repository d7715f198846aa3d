"""Observes a forward pass: step sizes, decays and the scale of activations of each layer.

It looks at a few positions of one sequence, so that it costs almost nothing, and changes no tensor.
"""

import torch
from torch import Tensor

STATISTICS = ("dt_p05", "dt_p50", "dt_p95", "decay_p05", "decay_p50", "decay_p95", "residual_rms", "mixer_rms")
"""The numbers of each layer: quantiles of the step sizes, and of the factors by which states shrink from one base to
the next; root mean squares of the residual stream that enters the layer, and of the output that its mixer adds.
"""
POSITIONS = 64
"""Number of neighbouring positions, in the middle of the sequence, from which step sizes are taken."""
_STREAM_POSITIONS = 256
_VALUES = 1 << 16
"""Largest number of values of which quantiles are taken."""
_QUANTILES = (0.05, 0.5, 0.95)


class Observer:
    """Collects the `STATISTICS` of each layer in one forward pass. Blocks and mixers call it, layer after layer."""

    def __init__(self) -> None:
        self._quantiles: list[Tensor] = []
        self._scales: list[Tensor] = []

    @torch.compiler.disable
    @torch.no_grad()
    def steps(self, dt: Tensor, A: Tensor) -> None:
        """Take in step sizes (P, n, E) of a layer, and its A (P, E, N) < 0."""
        dt = dt.float()
        few = max(1, _VALUES // A.numel())
        decays = (_thinned(dt, few)[..., None] * A.float()[:, None]).exp()
        at = torch.stack([dt.new_full((), quantile) for quantile in _QUANTILES])  # nothing is copied from the host
        most = max(1, _VALUES // (dt.shape[0] * dt.shape[2]))
        self._quantiles.append(
            torch.cat([values.quantile(at) for values in (_thinned(dt, most).flatten(), decays.flatten())])
        )

    @torch.compiler.disable
    @torch.no_grad()
    def streams(self, residual: Tensor, mixed: Tensor) -> None:
        """Take in the residual stream at a layer and its mixer's output, (S, B, L, D) each."""
        scales = [
            _thinned(values[:, 0], _STREAM_POSITIONS).float().square().mean().sqrt() for values in (residual, mixed)
        ]
        self._scales.append(torch.stack(scales))

    def told(self) -> Tensor:
        """The statistics, (layers, statistics) float32."""
        return torch.cat([torch.stack(self._quantiles), torch.stack(self._scales)], dim=1)


def _thinned(values: Tensor, most: int) -> Tensor:
    """(P, n, E) -> the same with fewer of the n, so that about `most` values remain."""
    return values[:, :: max(1, values.shape[1] // most)]
