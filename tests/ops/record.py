"""What ptxas made of the kernels, on record: a kernel whose intermediate form has not changed is not compiled again.

Each release of Triton has a record of its own, named after it. Compiling all takes ten minutes of a processor, looking
it up half of one. `make kernels` writes the records of the installed release and of the oldest anew, and compiles what
is not on them.
"""

import contextlib
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.nvidia.compiler import CUDABackend

from tests.ops import offsets
from tests.ops.tools import RECORDS


@dataclass(frozen=True)
class OnRecord:
    """Takes the place of a compiled kernel: the record has it under this key."""

    key: str


class _KnownError(Exception):
    """Compilation ends here."""


def load() -> dict[str, dict]:
    """The record of the installed release; empty where it has none."""
    path = _of(triton.__version__)
    return json.loads(path.read_text()) if path.exists() else {}


def save(found: Mapping[str, dict]) -> None:
    lines = [f"{json.dumps(key)}: {json.dumps(found[key])}" for key in sorted(found)]
    _of(triton.__version__).write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _of(release: str) -> Path:
    return RECORDS / f"{release}.json"


@contextlib.contextmanager
def keyed(known: Mapping[str, dict], reads: Callable) -> Iterator[None]:
    """Kernels get their key as `metadata.key`; of one that is known comes an `OnRecord`, and it is not compiled.

    The key holds all that the resources follow from: Triton's release, which brings ptxas, the kernel in Triton's first
    intermediate form without the places in the source, the options, the GPU, and the functions that read the resources.
    """
    reader = inspect.getsource(reads) + inspect.getsource(offsets)
    original, compile_whole = CUDABackend.add_stages, triton.compiler.compile

    def add_stages(self, stages, options, *language):
        original(self, stages, options, *language)
        lower = stages["ttgir"]
        chosen = {name: value for name, value in vars(options).items() if name != "extern_libs"}  # holds a path

        def look_up(module, metadata):
            text = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", re.sub(r"(?m)^#loc.*\n", "", str(module)))
            parts = (triton.__version__, str(self.target), str(sorted(chosen.items(), key=str)), text, reader)
            metadata["key"] = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
            if metadata["key"] in known:
                raise _KnownError(metadata["key"])
            return lower(module, metadata)

        stages["ttgir"] = look_up

    def compile_unknown(*arguments, **options):
        try:
            return compile_whole(*arguments, **options)
        except _KnownError as known:
            return OnRecord(*known.args)

    CUDABackend.add_stages, triton.compiler.compile = add_stages, compile_unknown
    try:
        yield
    finally:
        CUDABackend.add_stages, triton.compiler.compile = original, compile_whole
