"""What PyTorch calls a GPU, in one place. Imports no torch, as configurations name devices without it."""

from typing import Protocol

GPU = "cuda"
"""The type of its devices; PyTorch for ROCm has the same name for AMD's."""

DEVICES = ("auto", "cpu", GPU)
"""What a key or an option may say of a device."""


class _Device(Protocol):
    @property
    def type(self) -> str: ...


def is_gpu(device: _Device) -> bool:
    """Whether a `torch.device` is a GPU."""
    return device.type == GPU
