"""What a block of the model moves to and from a GPU's memory: all kernels and operators of a step, on fake tensors."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

from caduceus.model.heads import CaduceusForMaskedLM
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
OF_A_SEGMENT = ("kept", "pieces", "dpieces", "dA", "dD", "dbias")
"""What a launch for some of the items has for these alone; of the other operands it moves their share."""
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
    backward: int = 0
    """Launches in the backward pass; `launches` counts those of both."""
    bytes: int = 0
    flops: int = 0
    tiles: int | None = None
    """Tiles of a batched product's output: so many multiprocessors take part in it."""
    programs: int = 0
    """Blocks of threads of a kernel's last launch."""

    def less(self, other: "Traffic") -> "Traffic":
        counts = ("launches", "backward", "bytes", "flops")
        return replace(self, **{name: getattr(self, name) - getattr(other, name) for name in counts})


@dataclass
class Recorder(TorchDispatchMode):
    """Counts operators under it, and kernels that `record_launches` tells it of."""

    tokens: int
    found: dict[str, Traffic] = field(default_factory=lambda: defaultdict(Traffic))
    is_backward: bool = False
    """Whether what runs is of the backward pass."""

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
        self._launched(entry)
        entry.bytes += sum(size_of(t) for t in moved)
        if name in PRODUCTS:
            left, right = read[-2:]
            entry.flops += 2 * left.numel() * right.shape[-1]
            if right.dim() == 3 and left.shape[-1] >= self.tokens // 64:
                out = written[0].shape
                entry.tiles = math.prod((out[0], -(-out[1] // TILE), -(-out[2] // TILE)))

    def _launched(self, entry: Traffic) -> None:
        entry.launches += 1
        entry.backward += self.is_backward

    def _shape(self, tensor: Tensor) -> str:
        shown = ["L" if size == self.tokens else f"{size}" for size in tensor.shape]
        return f"({', '.join(shown)}) {str(tensor.dtype).removeprefix('torch.').replace('float', 'f')}"

    def kernel(self, kernel: JITFunction, arguments: tuple, options: dict) -> None:
        name = kernel.fn.__name__.removesuffix("_kernel")
        absent = {FLAGS.get(k, k[4:].lower()) for k, given in options.items() if k.startswith("HAS_") and not given}
        entry = self.found[name]
        self._launched(entry)
        entry.programs = math.prod(options["grid"])
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        share = _share(name, {**given, **options})
        for parameter, value in given.items():
            tensor = parameter.removesuffix("_ptr")
            if isinstance(value, Tensor) and tensor.lower() not in absent:
                moved = size_of(value) * PASSES.get(name, {}).get(tensor, 1)
                entry.bytes += moved if tensor in OF_A_SEGMENT else round(moved * share)


def _share(name: str, given: dict) -> float:
    """Of a scan's items, those that a launch takes: the backward pass may take them in segments."""
    if "item0" not in given:
        return 1.0
    rows = given["S"] * given["batch"] * given["n_chunks"]
    return given["grid"][0] / rows / (1 if name == "scan_replay" else given["P"])


def _storages(tensors: list[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def size_of(tensor: Tensor) -> int:
    """Bytes that it has itself, not as often as it is expanded."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return math.prod(sizes) * tensor.element_size()


@contextlib.contextmanager
def recording(tokens: int) -> Iterator[Recorder]:
    """Under `aot.compiling`: records everything that runs, also within the package's own operators."""
    recorder = Recorder(tokens)
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
            yield recorder
    finally:
        JITFunction.run = compile_only


def step(model: CaduceusForMaskedLM, batch: int, length: int, element: str) -> dict[str, Traffic]:
    """A step of pre-training without the update, under `aot.compiling`: what each kernel and operator does in it."""
    with recording(batch * length) as recorder:
        loss = aot.loss_of(model, batch, length, element)
        recorder.is_backward = True
        loss.backward()
    return recorder.found


def of_a_layer(one: dict[str, Traffic], two: dict[str, Traffic]) -> dict[str, Traffic]:
    """What a second block adds to a step."""
    differences = {name: traffic.less(one.get(name, Traffic())) for name, traffic in two.items()}
    return {name: traffic for name, traffic in differences.items() if traffic.launches}


def outside(one: dict[str, Traffic], layer: dict[str, Traffic]) -> dict[str, Traffic]:
    """What a step has besides its blocks."""
    rest = {name: traffic.less(layer.get(name, Traffic())) for name, traffic in one.items()}
    return {name: traffic for name, traffic in rest.items() if traffic.launches}


def launches(of: dict[str, Traffic]) -> tuple[int, int]:
    """How many there are in the forward and in the backward pass."""
    backward = sum(traffic.backward for traffic in of.values())
    return sum(traffic.launches for traffic in of.values()) - backward, backward
