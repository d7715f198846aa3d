"""Chooses the implementation of the ops: which there are, which can run here, and which `auto` takes."""

import logging
import os
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from caduceus.config import CaduceusConfig
from caduceus.devices import GPU, is_gpu
from caduceus.errors import UserError

BACKENDS = ("naive", "cpu", "triton", "mamba_ssm")
_log = logging.getLogger(__name__)


def resolve_backend(backend: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """The backend that computes in `dtype` on `device`; `auto` takes the fastest available one, and logs it once, with
    the reason.

    Raises `UserError` for an unknown backend and for one that cannot run here.
    """
    device_type, double = torch.device(device).type, dtype == torch.float64
    if backend == "auto":
        return _auto_backend(device_type, double)
    if backend not in BACKENDS:
        raise UserError(f"ops.backend: choose one of auto, {', '.join(BACKENDS)}; got '{backend}'")
    if reason := _unusable(backend, device_type, double):
        raise UserError(f"ops.backend: '{backend}' {reason}")
    return backend


def check_backend(backend: str, device: torch.device | str, dtype: torch.dtype, model: CaduceusConfig) -> None:
    """Raise `UserError` where the backend cannot run a model of these sizes, or the Triton kernels are wrong on this
    GPU.
    """
    name = resolve_backend(backend, device, dtype)
    supported = getattr(import_module(f"caduceus.ops.{name}"), "SUPPORTED", {})
    # torch computes the scans that Mamba-2's kernels do not take.
    bounded = ("d_conv",) if model.mixer == "mamba2" else ("d_state", "d_conv")
    for key in bounded:
        value = getattr(model, key)
        if key in supported and value not in supported[key]:
            least, most = supported[key][0], supported[key][-1]
            raise UserError(
                f"model.{key}: ops.backend '{name}' takes {least} to {most}, got {value}; 'naive' takes any value, but "
                "is slow"
            )
    device = torch.device(device)
    if name == "triton" and is_gpu(device) and torch.cuda.is_available():
        from caduceus.ops.self_check import check_kernels

        check_kernels(device)
        if model.mixer == "mamba":
            _tell_sums(model.d_state)


@cache
def _tell_sums(states: int) -> None:
    from caduceus.ops.triton.scan_launches import sums_in_warps

    form = "sums within a warp" if sums_in_warps(torch.bfloat16, states) else "tiles"
    _log.info("ops: in bf16 the scan of %d states takes %s for the gradients of B and C", states, form)


def load_module(backend: str, tensor: Tensor) -> ModuleType:
    """The module of `caduceus.ops` that computes with a tensor."""
    return sys.modules[_load(backend, tensor.device.type, tensor.dtype)]


def kernels_of_gpu(backend: str, tensor: Tensor) -> ModuleType | None:
    """The module with kernels for GPUs, where these compute with a tensor; else None."""
    module = load_module(backend, tensor)
    return module if is_triton(module) else None


def is_triton(module: ModuleType) -> bool:
    """Whether a backend is triton, whose kernels take `starts` and halos."""
    return module.__name__ == "caduceus.ops.triton"


@torch.compiler.assume_constant_result  # choosing and logging cannot be in a compiled graph
def _load(backend: str, device_type: str, dtype: torch.dtype) -> str:
    name = f"caduceus.ops.{resolve_backend(backend, device_type, dtype)}"
    import_module(name)
    return name


@cache
def _auto_backend(device_type: str, double: bool) -> str:
    chosen = {"cpu": "cpu", GPU: "triton"}.get(device_type, "naive")
    if reason := _unusable(chosen, device_type, double):
        _log.warning("ops.backend: auto fell back to the slow 'naive' on '%s': '%s' %s", device_type, chosen, reason)
        return "naive"
    _log.info("ops.backend: auto chose '%s' on device '%s'", chosen, device_type)
    return chosen


def _unusable(backend: str, device_type: str, double: bool) -> str | None:
    """Why a backend cannot run on a kind of device (in float64 if `double`), and what to do; None where it can."""
    if backend == "cpu" and device_type != "cpu":
        return f"runs on the CPU only, not on '{device_type}': choose triton, or run.device=cpu"
    if backend == "triton":
        if find_spec("triton") is None:
            return "needs the package triton: pip install triton"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        if device_type != GPU and not (device_type == "cpu" and interpreted):
            return f"needs an NVIDIA GPU, not '{device_type}': choose cpu (TRITON_INTERPRET=1 runs it there, slowly)"
        if device_type == GPU and torch.cuda.is_available() and (reason := _cannot_launch()):
            return f"needs a C compiler and Python's headers ({reason}): apt-get install gcc python3-dev, or set CC"
    if backend == "mamba_ssm":
        from caduceus.ops import mamba_ssm

        if device_type != GPU:
            return f"needs an NVIDIA GPU, not '{device_type}': choose cpu"
        if reason := mamba_ssm.missing():
            return f"{reason}: {mamba_ssm.INSTALL}"
    if backend in ("triton", "mamba_ssm") and double:
        return "does not compute in float64: choose naive, or train.precision=fp32"
    return None


def _cannot_launch() -> str | None:
    """The error of Triton when it compiles its kernel launcher, at its first use on a machine; None where
    that works.
    """
    from triton.runtime import driver

    try:
        driver.active.utils  # noqa: B018 (the property makes it)
    except Exception as error:  # from the compiler, the linker or the search for them
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None
