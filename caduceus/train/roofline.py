"""Which shares of a GPU's peak rates a model reaches, in its matrix products and in its scans.

The scan is bound by exponentials, not by products: a Caduceus reaches only a few per cent of the peak of products, so
both shares are reported. They count what the model needs, without recomputation.
"""

from __future__ import annotations

import functools
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from caduceus.config import Config
from caduceus.devices import is_gpu
from caduceus.model.costs import exponentials_per_base, flops_per_base

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Peaks:
    """Peak rates of one GPU, for dense matrices, from its maker's data sheet."""

    bf16_flops: float
    fp32_flops: float
    exponentials: float
    """Exponentials per second: 16 per clock and multiprocessor, at the highest clock."""


PEAKS = {
    # Products without sparsity, and fp32: NVIDIA's data sheets "A100 80GB", "H100 Tensor Core GPU", "H200 Tensor Core
    # GPU", "L40S" and "L4", and its white paper "Ada GPU Architecture" for the RTX 4090. Multiprocessors: the white
    # papers of the architectures. Clocks: those at which the fp32 rates are reached.
    "A100": Peaks(312e12, 19.5e12, 16 * 108 * 1.41e9),  # A100 80GB SXM, PCIe
    "H100 PCIe": Peaks(756e12, 51e12, 16 * 114 * 1.755e9),
    "H100": Peaks(989e12, 67e12, 16 * 132 * 1.98e9),  # H100 SXM
    "H200": Peaks(989e12, 67e12, 16 * 132 * 1.98e9),
    "L40S": Peaks(362e12, 91.6e12, 16 * 142 * 2.52e9),
    "L4": Peaks(121e12, 30.3e12, 16 * 58 * 2.04e9),
    "RTX 4090": Peaks(165.2e12, 82.6e12, 16 * 128 * 2.52e9),
}
"""Peaks by words of the name that torch reports; the first that fits is used."""
OTHER_CARDS = {"MIG", "NVL", "Laptop", "D"}
"""Words of the name that mean a slice of such a card, or a card with other rates."""
_log = logging.getLogger(__name__)


def utilization(config: Config, bases_per_second: float, device: torch.device) -> dict[str, float]:
    """`mfu` and `scan_roofline`: shares of a GPU's peaks at this rate per GPU; empty for a device of unknown peaks."""
    peaks = _peaks(device)
    if peaks is None:
        return {}
    flops = peaks.bf16_flops if config.train.precision == "bf16" else peaks.fp32_flops
    return {
        "mfu": flops_per_base(config.model) * bases_per_second / flops,
        "scan_roofline": exponentials_per_base(config.model) * bases_per_second / peaks.exponentials,
    }


@functools.cache
def _peaks(device: torch.device) -> Peaks | None:
    if not is_gpu(device):
        return None
    import torch  # imported here, as readers of the peaks alone do not need it

    name = torch.cuda.get_device_name(device)
    peaks = _peaks_by_name(name)
    if peaks is None:
        _log.warning("perf: the peak rates of '%s' are unknown, so rows have no mfu and no scan_roofline", name)
    return peaks


def _peaks_by_name(name: str) -> Peaks | None:
    words = re.split(r"[\s-]+", name)
    if not OTHER_CARDS.isdisjoint(words):
        return None
    of_words = f" {' '.join(words)} "
    return next((peaks for part, peaks in PEAKS.items() if f" {part} " in of_words), None)
