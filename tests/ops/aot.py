"""Compiles the Triton kernels ahead of time for GPUs that are not here, and reads what ptxas made of them.

Run as a program in a process of its own with compute capability, element type, what to launch and,
unless it is to be all, names of kernels: prints one JSON object per kernel, from the record (tests/ops/record.py) where
that has it. With `--runs`, for each of RUNS one list of such objects on a line; with `--afresh KEY`, the kernel of that
key is compiled though it is on record; with `--record` alone, the record is written anew. What is compiled is what the
package's own launch code asks for: models and ops run forward and backward on fake tensors, and where Triton would
launch a kernel it only compiles it, with the types, divisors and constants that Triton itself finds in the arguments.
"""

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
import triton
import yaml
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from caduceus.config import CaduceusConfig
from caduceus.model.heads import CaduceusForMaskedLM
from caduceus.ops import triton as backend
from caduceus.ops.operands import ScanOperands
from caduceus.ops.triton import conv, cross_entropy, device, gated, norm, scan, ssd
from tests.ops import record
from tests.ops.offsets import narrow_products
from tests.ops.record import OnRecord
from tests.ops.tools import RUNS

BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ELEMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MULTIPROCESSORS = 132  # of an H100
LEFT_OUT = {"ph-tiny", "ps-tiny", "plantcad-l20", "plantcad-l24", "plantcad-l28"}
"""Models of sizes between those that are compiled, which take long."""
GIANT = 2**23
"""A sequence whose offsets pass 2^31 in every tensor."""


class Target:
    """What Triton asks of a driver in order to compile, for a GPU of a compute capability."""

    def __init__(self, capability: int) -> None:
        self.get_current_device = self.get_current_stream = lambda *_: capability
        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)


class Pointer:
    """A tensor as Triton specialises on it."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        offset = tensor.storage_offset() * tensor.element_size()
        self.data_ptr = lambda: offset


class Instruction(NamedTuple):
    """An instruction of the machine code."""

    address: int
    name: str
    """With its modifiers."""
    operands: str
    predicate: str = ""


@contextlib.contextmanager
def compiling(*capabilities: int, names: Container[str] = ()) -> Iterator[dict[str, list]]:
    """Launches compile instead, for each capability. Gives kernels by name without `_kernel`, each compiled once,
    or its `OnRecord` where `record.keyed` knows it."""
    found: dict[str, list] = {}
    targets = [Target(capability) for capability in capabilities]

    def run(kernel, *arguments, grid, warmup, **options):
        name = kernel.fn.__name__.removesuffix("_kernel")
        if names and name not in names:
            return
        arguments = [Pointer(a) if isinstance(a, Tensor) else a for a in arguments]
        for target in targets:
            triton.runtime.driver.set_active(target)
            compiled = launch(kernel, *arguments, grid=grid, warmup=True, **options)
            if all(compiled is not other for other in found.setdefault(name, [])):
                found[name].append(compiled)

    launch = JITFunction.run
    for module in (device, norm, gated, cross_entropy, ssd):
        module.multiprocessors = lambda device: MULTIPROCESSORS
    for operation, launches in LAUNCHES.items():
        operation.register_fake(launches)
    os.environ["TRITON_INTERPRET"] = "1"  # lets the ops take tensors that are not on a GPU; read before, by the kernels
    JITFunction.run = run
    try:
        with FakeTensorMode():
            yield found
    finally:
        JITFunction.run = launch
        del os.environ["TRITON_INTERPRET"]


LAUNCHES = {
    scan.scan_forward: scan.launch_forward,
    scan.scan_backward: scan.launch_backward,
    conv.conv_forward: conv.launch_forward,
    conv.conv_backward: conv.launch_backward,
    norm.add_norm_forward: norm.launch_forward,
    norm.add_norm_backward: norm.launch_backward,
    gated.gated_norm_forward: gated.launch_forward,
    gated.gated_norm_backward: gated.launch_backward,
    ssd.ssd_forward: ssd.launch_forward,
    ssd.ssd_backward: ssd.launch_backward,
    cross_entropy.cross_entropy_forward: cross_entropy.launch_forward,
    cross_entropy.cross_entropy_backward: cross_entropy.launch_backward,
}
"""What each operation runs."""


class SharedSequence:
    """A context of two ranks whose exchanges only have the right shapes."""

    rank, size = 0, 2

    def edges(self, x: Tensor, width: int) -> tuple[Tensor, Tensor]:
        return x[:, :, :width], x[:, :, -width:]

    def all_gather(self, part: Tensor) -> Tensor:
        return torch.stack([part, part])


def train(
    config: CaduceusConfig, batch: int, length: int, element: str, shared: bool = False, keep: bool = False
) -> None:
    """A step of pre-training. `keep`: by states that the forward pass keeps."""
    loss_of(untrained(config, shared, keep), batch, length, element).backward()


def untrained(config: CaduceusConfig, shared: bool = False, keep: bool = False) -> CaduceusForMaskedLM:
    model = CaduceusForMaskedLM(config, backend="triton")
    model.keep_states(config.n_layer if keep else 0)
    if shared:
        model.share_sequences(SharedSequence())
    return model


def loss_of(model: CaduceusForMaskedLM, batch: int, length: int, element: str) -> Tensor:
    """The loss of masked bases with weights."""
    ids = torch.zeros(batch, length, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16, enabled=element == "bf16"):
        return model(ids, labels=ids, loss_weights=torch.ones(batch, length), return_logits=False).loss


def train_packed(config: CaduceusConfig, length: int, element: str) -> None:
    """The ops that know of several sequences in one, as a mixer calls them."""
    P, E, N, K = 2, config.d_inner, config.d_state, config.d_conv

    def leaf(*shape: int, dtype: torch.dtype = ELEMENTS[element]) -> Tensor:
        return torch.zeros(shape, dtype=dtype, requires_grad=True)

    starts = torch.zeros(1, length, dtype=torch.bool)
    vectors = {name: leaf(P, E, dtype=torch.float32) for name in ("conv_bias", "D", "dt_bias")}
    u = backend.bidirectional_conv1d(
        leaf(1, 1, length, E), leaf(P, E, K, dtype=torch.float32), vectors["conv_bias"], starts
    )
    _, B, C = leaf(P, 1, 1, length, config.dt_rank + 2 * N).split([config.dt_rank, N, N], dim=-1)
    A, z = leaf(P, E, N, dtype=torch.float32), leaf(1, 1, length, E)
    y = backend.bidirectional_scan(
        ScanOperands(u, leaf(*u.shape), A, B, C, vectors["D"], z, vectors["dt_bias"]), starts
    )
    y.sum().backward()


def resources(compiled) -> dict:
    """Registers, bytes of stack and instructions that reach it, which is where registers are spilled to, and bytes of
    shared memory."""
    text = _dumped(compiled, "--dump-resource-usage", "-sass")
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {
        "registers": int(registers),
        "stack": int(stack),
        "local": sum(i.name.split(".")[0] in ("LDL", "STL") for i in _instructions(text)),
        "shared": compiled.metadata.shared,
        "fused": compiled.metadata.enable_fp_fusion,
        "atomics": "atomic" in compiled.asm["ttir"],
        "narrow_products": narrow_products(compiled.asm["ttir"]),
    }


def disassembled(compiled) -> list[Instruction]:
    return _instructions(_dumped(compiled, "-sass"))


def _dumped(compiled, *what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [BINARIES / "cuobjdump", *what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _instructions(text: str) -> list[Instruction]:
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(@!?U?P\w+ )?([A-Z0-9.]+)([^;]*);", text, re.MULTILINE)
    return [Instruction(int(address, 16), name, operands, p.strip()) for address, p, name, operands in lines]


def published_models() -> dict[str, CaduceusConfig]:
    """The models of configs/model, by name, with two layers: a first block and one like all others."""
    files = sorted((Path(__file__).parents[2] / "configs" / "model").glob("*.yaml"))
    return {f.stem: CaduceusConfig(**yaml.safe_load(f.read_text())["model"] | {"n_layer": 2}) for f in files}


def launch_all(element: str) -> None:
    """All that the published models launch, on a sequence alone or in a batch, and long ones where ranks share one."""
    for name, config in published_models().items():
        if name in LEFT_OUT or config.mixer != "mamba":  # another mixer has no kernels of its own
            continue
        short = "1k" in name
        for keep in (False, True):
            train(
                config, 128 if short else 1, 1024 if short else 2**20 if "1m" in name else 131_072, element, keep=keep
            )
        if not short:
            train(config, 1, 16_384, element, shared=True)


def launch_one(element: str) -> None:
    for length in (131_072, 2**21):
        for keep in (False, True):
            train(CaduceusConfig(d_model=256, n_layer=2), 1, length, element, keep=keep)


def launch_rest(element: str) -> None:
    """A packed sequence, one of odd length, one so long that offsets pass 2^31, and one of each, which Triton makes a
    constant."""
    config = CaduceusConfig(d_model=256, n_layer=2)
    train_packed(config, 131_072, element)
    for keep in (False, True):
        train(config, 3, 1037, element, keep=keep)
        train(config, 2, GIANT, element, keep=keep)
    run_smallest(element)


def run_smallest(element: str) -> None:
    one = torch.zeros(1, 1, 1, 1, dtype=ELEMENTS[element], requires_grad=True)
    vector = torch.ones(1, 1, requires_grad=True)
    backend.bidirectional_conv1d(one, vector[None], vector).sum().backward()
    operands = ScanOperands(*(one[None],) * 2, -vector[None], *(one[None],) * 2, vector, one, vector)
    backend.bidirectional_scan(operands).sum().backward()
    normed, total = backend.add_norm(one, one, vector, vector, 1e-5, one.dtype)
    loss, _ = backend.head_cross_entropy(normed, vector[None], torch.zeros(1, 1, dtype=torch.long), None, 4)
    (loss + total.sum()).backward()


def launch_scan(element: str, states: int) -> None:
    for keep in (False, True):
        train(CaduceusConfig(d_model=256, n_layer=2, d_state=states), 1, 131_072, element, keep=keep)


def launch_gated(element: str) -> None:
    """The gated norm of one direction and of two, of one channel and of PlantCAD2's least and most, over GIANT."""
    for directions, E in itertools.product((1, 2), (1, 1536, 3072)):
        sizes = (directions, 1, 1, GIANT, E), (1, 1, GIANT, E)
        y, z = (torch.zeros(size, dtype=ELEMENTS[element], requires_grad=True) for size in sizes)
        weight = torch.ones(directions, E, requires_grad=True)
        gated.gated_norm(y, z, weight, 1e-5).sum().backward()


def launch_ssd(element: str) -> None:
    """Mamba-2's scan: PlantCAD2's heads, which are also the most that the kernels take, and odd ones; packed sequences,
    one of odd length that goes on from a state, and GIANT."""
    for W, N, length, goes_on in ((64, 64, 8192, False), (5, 6, 1037, True), (64, 64, GIANT, False), (1, 1, 1, True)):
        shapes = {"x": (2, 2, 1, length, 4, W), "dt": (2, 2, 1, length, 4), "A": (2, 4)}
        shapes |= {"B": (2, 2, 1, length, N), "C": (2, 2, 1, length, N), "D": (2, 4), "dt_bias": (2, 4)}
        wide = {"A", "D", "dt_bias"}
        operands = tuple(
            torch.zeros(shape, dtype=torch.float32 if name in wide else ELEMENTS[element], requires_grad=True)
            for name, shape in shapes.items()
        )
        state = torch.zeros(2, 2, 1, 4, W, N, requires_grad=True) if goes_on else None
        starts = torch.zeros(1, length, dtype=torch.bool) if length == 8192 else None
        y, final = ssd.ssd_scan(operands, state, starts, False)
        (y.sum() + final.sum()).backward() if goes_on else y.sum().backward()


def compile_run(
    capability: str, element: str, what: str, *names: str, known: Mapping[str, dict] = MappingProxyType({})
) -> dict[str, dict]:
    """By key, the name and resources of each kernel that a run launches. Those that are known are not compiled."""
    with record.keyed(known, resources), compiling(int(capability), names=names) as found:
        if what.isdecimal():
            launch_scan(element, int(what))
        else:
            {"published": launch_all, "one": launch_one, "rest": launch_rest, "gated": launch_gated, "ssd": launch_ssd}[
                what
            ](element)
    kernels = {}
    for name, compiled in ((name, each) for name, group in found.items() for each in group):
        if isinstance(compiled, OnRecord):
            kernels[compiled.key] = known[compiled.key]
        else:
            of = {"kernel": name, "capability": int(capability), "element": element, "run": what}
            kernels[compiled.metadata.key] = of | resources(compiled)
    return kernels


def compile_afresh(key: str, known: Mapping[str, dict]) -> dict[str, dict]:
    """The kernel of a key, compiled though it is known."""
    capability, element, what, name = (str(known[key][word]) for word in ("capability", "element", "run", "kernel"))
    others = {other: kernel for other, kernel in known.items() if other != key}
    found = compile_run(capability, element, what, name, known=others)
    return {other: kernel for other, kernel in found.items() if other == key}


def main() -> None:
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # also what Triton's own cache has, so that each kernel gets its key
    arguments, known = sys.argv[1:], record.load()
    if arguments == ["--record"]:
        record.save({key: kernel for run in RUNS for key, kernel in compile_run(*run, known=known).items()})
        return
    if arguments == ["--runs"]:
        for run in RUNS:
            kernels = compile_run(*run, known=known)
            print(json.dumps([kernel | {"key": key} for key, kernel in kernels.items()]), flush=True)
        return
    found = compile_afresh(arguments[1], known) if arguments[0] == "--afresh" else compile_run(*arguments, known=known)
    for key, kernel in found.items():
        print(json.dumps(kernel | {"key": key}), flush=True)


if __name__ == "__main__":
    main()
