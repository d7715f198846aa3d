"""Imports the package `deepspeed`, only where it is used. Imports no torch."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from caduceus.errors import ONE_LINE, UserError, one_line


def import_deepspeed(device_type: str) -> ModuleType:
    """The package, set to a device, quiet, and without compiling kernels of its own.

    Raises `ImportError` where it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    os.environ.setdefault("LOCAL_RANK", "0")  # one process may have been started without a launcher
    import deepspeed

    deepspeed.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # about names that it calls
    # On a CPU it would compile its own collectives at the first start, which needs a compiler; gloo has them already.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def need_deepspeed(device_type: str) -> ModuleType:
    """The package. Raises `UserError` where it is not installed."""
    try:
        return import_deepspeed(device_type)
    except ImportError:
        raise UserError(
            "parallel.strategy: deepspeed is not installed; DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
        ) from None


@contextmanager
def naming_its_file(path: str | None) -> Iterator[None]:
    """A context in which errors of DeepSpeed become a `UserError` that names the user's file, if there is one."""
    try:
        yield
    except (*ONE_LINE, RuntimeError, OSError, MemoryError):  # memory, devices and networks have other causes
        raise
    except Exception as error:  # it raises many kinds, including assertions
        if path is None:
            raise
        raise UserError(
            f"parallel.deepspeed_config: DeepSpeed does not start with {path}: {one_line(error)}"
        ) from error
