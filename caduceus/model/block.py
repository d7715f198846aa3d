"""Norm and block of the backbone. Shapes: S streams, B batch, L length, D d_model."""

import torch
from torch import Tensor, nn

from caduceus.config import CaduceusConfig
from caduceus.model.mamba import BiMamba
from caduceus.model.mamba2 import BiMamba2
from caduceus.model.mixer import with_mirrored_channels
from caduceus.model.observer import Observer
from caduceus.model.precision import product_dtype
from caduceus.ops import add_norm


def residual_dtype(config: CaduceusConfig, weight: Tensor) -> torch.dtype:
    """The residual's type in a model with these weights: at least fp32, or without `residual_in_fp32` that of
    products.
    """
    return torch.promote_types(weight.dtype, torch.float32) if config.residual_in_fp32 else product_dtype(weight)


class Norm(nn.Module):
    """RMSNorm or LayerNorm over D of residual + x, (S, B, L, D), in at least fp32. Mirrored channels as in `Mixer`.

    Returns the norm, in the type of products, and the sum, in the residual's type.
    """

    def __init__(self, config: CaduceusConfig, *, mirrored_stream: int, mirror_channels: bool, backend: str) -> None:
        super().__init__()
        self.eps = config.norm_epsilon
        self.mirrored_stream = mirrored_stream
        self.mirror_channels = mirror_channels
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(config.d_model))
        self.bias = None if config.rms_norm else nn.Parameter(torch.empty(config.d_model))

    @torch.no_grad()
    def init_weights(self) -> None:
        self.weight.fill_(1)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Without a residual the sum is x itself."""
        streams, dtype = x.shape[0], product_dtype(self.weight)
        weight, bias = (None if v is None else self._for_streams(v, streams) for v in (self.weight, self.bias))
        return add_norm(x, residual, weight, bias, eps=self.eps, out_dtype=dtype, backend=self.backend)

    def _for_streams(self, vector: Tensor, streams: int) -> Tensor:
        return with_mirrored_channels(vector, 0, self.mirrored_stream, streams) if self.mirror_channels else vector


class Block(nn.Module):
    """Residual add, norm and mixer. The residual is added where a norm reads it, so that one kernel does both."""

    def __init__(self, config: CaduceusConfig, *, mirrored_stream: int, mirror_channels: bool, backend: str) -> None:
        super().__init__()
        options = {"mirrored_stream": mirrored_stream, "mirror_channels": mirror_channels, "backend": backend}
        self.norm = Norm(config, **options)
        self.mixer = (BiMamba2 if config.mixer == "mamba2" else BiMamba)(config, **options)
        self.observer: Observer | None = None

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        self.norm.init_weights()
        self.mixer.init_weights(generator)

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None = None,
        pad_mask: Tensor | None = None,
        starts: Tensor | None = None,
        recompute_scan_inputs: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """(mixer(norm(residual + hidden)), residual + hidden), (S, B, L, D) each; the next block adds them."""
        normed, residual = self.norm(hidden, residual)
        mixed = self.mixer(normed, pad_mask, starts, recompute_scan_inputs)
        if self.observer is not None:
            self.observer.streams(residual, mixed)
        return mixed, residual
