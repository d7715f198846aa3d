"""What a block of the model moves to and from a GPU's memory: all kernels and operators of a step, on fake tensors."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from tests.ops import aot

PASSES = {
    "chunk_carry": {"state": 2},
    "scan_forward": {"out": 3},
    "chunk_adjoint": {"z": 2, "dout": 2},
    "chunk_adjoint_dz": {"z": 2, "dout": 2},
    "scan_replay": {"dz": 3},
    "scan_keep": {"out": 3},
    "scan_backward": {"z": 2, "dout": 2, "adjoint": 2, "A": 0, "dA": 2},
    "conv_backward": {"w": 0},
}
"""How often a kernel moves a tensor, where it is not once: operands of both directions, sums that wait in an output."""
FLAGS = {"HAS_WEIGHTS": "loss_weight"}
"""Options that say whether there is an operand, where its name is not the option's."""
TILE = 128
"""Rows and columns of the output that a multiprocessor computes in a product."""
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
FREE = (
    "empty",
    "new_empty",
    "empty_like",
    "empty_strided",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "_unsafe_view",
)


@dataclass
class Traffic:
    """What one kernel or operator moves and computes in a step."""

    launches: int = 0
    bytes: int = 0
    flops: int = 0
    tiles: int | None = None
    """Tiles of a batched product's output: so many multiprocessors take part in it."""
    programs: int = 0
    """Blocks of threads of a kernel's last launch."""

    def less(self, other: "Traffic") -> "Traffic":
        counts = (self.launches - other.launches, self.bytes - other.bytes, self.flops - other.flops)
        return Traffic(*counts, self.tiles, self.programs)


@dataclass
class Recorder(TorchDispatchMode):
    """Counts operators under it, and kernels that `record_launches` tells it of."""

    length: int
    found: dict[str, Traffic] = field(default_factory=lambda: defaultdict(Traffic))

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        name = operation.overloadpacket.__name__
        if operation.namespace == "aten" and name not in FREE:
            read = [t for t in tree_leaves((arguments, options)) if isinstance(t, Tensor)]
            written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            if not (operation.is_view and _storages(read) & _storages(written)):  # `to` and `contiguous` may copy
                self._count(name, read, written)
        return result

    def _count(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        moved = [*read, *written]
        if name in ("zero_", "fill_", "copy_"):
            moved = [*read[1:], *written]
        entry = self.found[f"{name} {' '.join(self._shape(t) for t in (read or written)[-2:])}"]
        entry.launches += 1
        entry.bytes += sum(size_of(t) for t in moved)
        if name in PRODUCTS:
            left, right = read[-2:]
            entry.flops += 2 * left.numel() * right.shape[-1]
            if right.dim() == 3 and left.shape[-1] >= self.length // 64:
                out = written[0].shape
                entry.tiles = math.prod((out[0], -(-out[1] // TILE), -(-out[2] // TILE)))

    def _shape(self, tensor: Tensor) -> str:
        shown = ["L" if size == self.length else f"{size}" for size in tensor.shape]
        return f"({', '.join(shown)}) {str(tensor.dtype).removeprefix('torch.').replace('float', 'f')}"

    def kernel(self, kernel: JITFunction, arguments: tuple, options: dict) -> None:
        name = kernel.fn.__name__.removesuffix("_kernel")
        absent = {FLAGS.get(k, k[4:].lower()) for k, given in options.items() if k.startswith("HAS_") and not given}
        entry = self.found[name]
        entry.launches += 1
        entry.programs = math.prod(options["grid"])
        for parameter, value in zip(kernel.arg_names, arguments, strict=False):
            tensor = parameter.removesuffix("_ptr")
            if isinstance(value, Tensor) and tensor.lower() not in absent:
                entry.bytes += size_of(value) * PASSES.get(name, {}).get(tensor, 1)


def _storages(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def size_of(tensor: Tensor) -> int:
    """Bytes that it has itself, not as often as it is expanded."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sizes) * tensor.element_size()


@contextlib.contextmanager
def recording(length: int) -> Iterator[dict[str, Traffic]]:
    """Under `aot.compiling`: everything that runs, also within the package's own operators, by what it is."""
    recorder = Recorder(length)
    compile_only = JITFunction.run

    def run(kernel, *arguments, **options):
        recorder.kernel(kernel, arguments, options)
        return compile_only(kernel, *arguments, **options)

    def within(launches):
        def recorded(*arguments, **options):
            with recorder:
                return launches(*arguments, **options)

        return recorded

    JITFunction.run = run
    for operation, launches in aot.LAUNCHES.items():
        operation.register_fake(within(launches))
    try:
        with recorder:
            yield recorder.found
    finally:
        JITFunction.run = compile_only


def of_a_layer(one: dict[str, Traffic], two: dict[str, Traffic]) -> dict[str, Traffic]:
    """What a second block adds to a step."""
    differences = {name: traffic.less(one.get(name, Traffic())) for name, traffic in two.items()}
    return {name: traffic for name, traffic in differences.items() if traffic.launches}


def outside(one: dict[str, Traffic], layer: dict[str, Traffic]) -> dict[str, Traffic]:
    """What a step has besides its blocks, without what initialises the weights."""
    rest = {name: traffic.less(layer.get(name, Traffic())) for name, traffic in one.items()}
    return {name: traffic for name, traffic in rest.items() if traffic.launches and not name.startswith("uniform_")}
