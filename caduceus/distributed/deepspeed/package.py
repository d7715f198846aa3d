"""The package `deepspeed`, imported where it is used only. Imports no torch."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

from caduceus.errors import ONE_LINE, UserError, one_line


def import_deepspeed(device_type: str) -> ModuleType:
    """The package, told which device to use, quiet, and with no kernel of its own to be compiled.

    Raises `ImportError` where it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    os.environ.setdefault("LOCAL_RANK", "0")  # one process may have been started without a launcher
    import deepspeed

    deepspeed.logger.setLevel("WARNING")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # of names that it calls
    # On CPU it would compile collectives of its own at the first start, which needs a compiler; gloo has them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def need_deepspeed(device_type: str) -> ModuleType:
    """The package; raises `UserError` where it is not installed."""
    try:
        return import_deepspeed(device_type)
    except ImportError:
        raise UserError(
            "parallel.strategy: deepspeed is not installed; DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed"
        ) from None


@contextmanager
def naming_its_file(path: str | None) -> Iterator[None]:
    """Turns what DeepSpeed complains about into a `UserError` that names the user's file, if there is one."""
    try:
        yield
    except (*ONE_LINE, RuntimeError, OSError, MemoryError):  # memory, devices and networks have other causes
        raise
    except Exception as error:  # of many kinds, assertions among them
        if path is None:
            raise
        raise UserError(
            f"parallel.deepspeed_config: DeepSpeed does not start with {path}: {one_line(error)}"
        ) from error
