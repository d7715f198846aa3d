"""What ptxas made of the kernels, on record: a kernel whose intermediate form has not changed is not compiled again.

Compiling all takes ten minutes of a processor. `make kernels` writes the record anew, compiling what is not on it.
"""

import contextlib
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import triton
from triton.backends.nvidia.compiler import CUDABackend

from tests.ops import offsets

RECORD = Path(__file__).with_name("resources.json")


class OnRecordError(Exception):
    """Compilation ends here, as the record has the kernel under this key."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def load() -> dict[str, dict]:
    return json.loads(RECORD.read_text())


def save(found: Mapping[str, dict]) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(found[key])}" for key in sorted(found)]
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")


@contextlib.contextmanager
def keyed(known: Mapping[str, dict], reads: Callable) -> Iterator[None]:
    """Kernels get their key as `metadata.key`; compiling one that is known raises OnRecordError.

    The key holds all that the resources follow from: Triton's release, which brings ptxas, the kernel in Triton's first
    intermediate form without the places in the source, the options, the GPU, and the functions that read the resources.
    """
    reader = inspect.getsource(reads) + inspect.getsource(offsets)
    original = CUDABackend.add_stages

    def add_stages(self, stages, options, *language):
        original(self, stages, options, *language)
        lower = stages["ttgir"]
        chosen = {name: value for name, value in vars(options).items() if name != "extern_libs"}  # holds a path

        def look_up(module, metadata):
            text = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", re.sub(r"(?m)^#loc.*\n", "", str(module)))
            parts = (triton.__version__, str(self.target), str(sorted(chosen.items(), key=str)), text, reader)
            metadata["key"] = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
            if metadata["key"] in known:
                raise OnRecordError(metadata["key"])
            return lower(module, metadata)

        stages["ttgir"] = look_up

    CUDABackend.add_stages = add_stages
    try:
        yield
    finally:
        CUDABackend.add_stages = original
