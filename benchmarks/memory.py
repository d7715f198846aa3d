"""What training keeps in memory: of a block, by name, and of whole steps, counted and measured.

    python benchmarks/memory.py [--d-model 256] [--layers 16] [--lengths 32768 131072 1048576] [--gib 80]
        [--cpu-layers 4] [--cpu-length 2048]

Counted: the real model and the launch code of the Triton backend run forward and backward on fake tensors, as for an
H100 under bf16 autocast. The count is the most bytes of tensors that live at one time, so it includes the gradients and
the scratch memory of the block in whose backward pass it is, plus weights and AdamW's moments. Measured, if there is a
GPU: the most that torch's allocator held in such a step. On the CPU smaller steps of the `cpu` backend in fp32 are
counted in the same way, on real tensors, and measured as resident memory: VmHWM in a process of its own, minus what it
held before. `states kept` is `train.keep_states: all`. `scan` recomputes what feeds the scan in all blocks, `block`
recomputes all blocks, and `auto` as little as fits into --gib, or on the CPU into half of what they take when nothing
is recomputed.
"""

import argparse
import contextlib
import datetime
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any
from unittest.mock import patch

import torch
from gpu import CommandLine, device_name, positive
from torch import Tensor, nn
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from caduceus.allocator import keep_freed_memory
from caduceus.config import CaduceusConfig
from caduceus.distributed.footprint import blocks_to_recompute
from caduceus.model import mamba
from caduceus.model.block import residual_dtype
from caduceus.model.heads import CaduceusForMaskedLM
from caduceus.ops.triton import conv, cross_entropy, device, norm, scan
from caduceus.train.memory import TensorBytes, kept_storages, peak_bytes

MODELS = {"Caduceus-Ph": False, "Caduceus-PS": True}
MULTIPROCESSORS = 132
"""Multiprocessors of an H100."""


def main() -> None:
    parser = CommandLine(__doc__)
    for name, default in (("d-model", 256), ("layers", 16), ("gib", 80), ("cpu-layers", 4), ("cpu-length", 2048)):
        parser.add_argument(f"--{name}", type=positive, default=default)
    parser.add_argument("--lengths", type=positive, nargs="+", default=[32_768, 131_072, 1_048_576])
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_or_leave()
    if options.measure:
        print(measure_on_cpu(*json.loads(options.measure)))
        return
    print(f"{datetime.date.today()} · {device_name(options.device)} · torch {torch.__version__}\n")
    for name, rcps in MODELS.items():
        print_block(name, CaduceusConfig(d_model=options.d_model, rcps=rcps))
    columns = "blocks recomputed whole | of others the scan's inputs | GiB, counted | GiB, measured"
    print(f"| model | layers | backend | length | recomputed | {columns} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, rcps in MODELS.items():
        config = CaduceusConfig(d_model=options.d_model, n_layer=options.layers, rcps=rcps)
        for length in options.lengths:
            print_steps(name, config, "triton", length, options.gib * 2**30, options.device == "cuda")
    for name, rcps in MODELS.items():
        config = CaduceusConfig(d_model=options.d_model, n_layer=options.cpu_layers, rcps=rcps)
        print_steps(name, config, "cpu", options.cpu_length, None, True)


def print_block(name: str, config: CaduceusConfig) -> None:
    length = 131_072
    kept, lean = (kept_by_a_block(config, length, again) for again in (False, True))
    print(f"{name}, d_model {config.d_model}, d_inner {config.d_inner}, {config.d_state} states, bf16\n")
    print("| kept by a block | type | bytes per token | where the scan's inputs are recomputed |\n|---|---|---|---|")
    for label, dtype, count in sorted(kept, key=lambda row: -row[2]):
        again = f"{count / length:,.1f}" if (label, dtype, count) in lean else ""
        print(f"| {label} | {dtype} | {count / length:,.1f} | {again} |")
    sums = [f"{sum(count for *_, count in rows) / length:,.0f}" for rows in (kept, lean)]
    print(f"| all | | {' | '.join(sums)} |\n")


def kept_by_a_block(config: CaduceusConfig, length: int, recompute_scan_inputs: bool) -> list[tuple[str, str, int]]:
    """(name, type, bytes) of what is kept of the sequence in one block, one row per storage.

    What has as many bytes at twice the length is made of weights.
    """
    short, long = (named_kept_storages(config, n, recompute_scan_inputs) for n in (length, 2 * length))
    return [row for row, twice in zip(short, long, strict=True) if twice[2] > row[2]]


def named_kept_storages(config: CaduceusConfig, length: int, recompute_scan_inputs: bool) -> list[tuple[str, str, int]]:
    names: dict[int, tuple[str, str]] = {}

    def note(label: str, tensor: Tensor) -> None:
        names[tensor.untyped_storage()._cdata] = label, str(tensor.dtype).removeprefix("torch.")

    def noting(op: Callable, inputs: tuple[str, ...], output: str) -> Callable:
        def run(*args, **kwargs) -> Tensor:
            for label, tensor in zip(inputs, args, strict=False):
                if label:
                    note(label, tensor)
            result = op(*args, **kwargs)
            note(output, result)
            return result

        return run

    convolve = noting(mamba.bidirectional_conv1d, ("x, the convolution's input",), "u, the convolution's output")
    scan_names = ("", "dt", "", "B, C and what dt is projected from", "", "", "z, the gate")
    scanned = noting(mamba.bidirectional_scan, scan_names, "y, the scan's output")
    with (
        on_fake_gpu(),
        torch.autocast("cpu", torch.bfloat16),
        patch.object(mamba, "bidirectional_conv1d", convolve),
        patch.object(mamba, "bidirectional_scan", scanned),
    ):
        block = CaduceusForMaskedLM(config, backend="triton").blocks[0]
        shape = (2 if config.rcps else 1, 1, length, config.d_model)
        residual = torch.empty(shape, dtype=residual_dtype(config, block.norm.weight), requires_grad=True)
        hidden = torch.empty(shape, requires_grad=True, dtype=torch.bfloat16)

        def note_norm(_module: nn.Module, _inputs: tuple, results: tuple[Tensor, Tensor]) -> None:
            note("the norm's output", results[0])
            note("residual", results[1])

        block.norm.register_forward_hook(note_norm)
        kept = kept_storages(block, hidden, residual, None, None, recompute_scan_inputs)
        unnamed = "states and step sums at the borders of chunks", "float32"
        return [(*names.get(storage._cdata, unnamed), storage.nbytes()) for storage in kept]


def print_steps(name: str, config: CaduceusConfig, backend: str, length: int, free: int | None, measured: bool) -> None:
    """Rows for each way of `train.activation_checkpointing`."""
    layers = config.n_layer
    count = partial(counted, config, backend, length)
    if backend == "triton":
        told = f"{counted(config, backend, length, (0, 0), kept=layers) / 2**30:,.2f} | -"
        print(f"| {name} | {layers} | {backend} | {length:,} | none, states kept | 0 | 0 | {told} |", flush=True)
    none, scan, block = (0, 0), (0, layers), (layers, 0)
    full, lean, least = (count(recomputed) for recomputed in (none, (0, layers - 1), (layers - 1, 0)))
    added = [(peak - least) // max(1, layers - 1) for peak in (lean, full)]
    auto = blocks_to_recompute(least, *added, full // 2 if free is None else free, layers)
    for mode, recomputed in (("none", none), ("scan", scan), ("auto", auto), ("block", block)):
        found = measure(config, backend, length, recomputed) if measured else None
        cells = f"{mode} | {recomputed[0]} | {recomputed[1]} | {count(recomputed) / 2**30:,.2f}"
        told = "-" if found is None else f"{found / 2**30:,.2f}" if isinstance(found, int) else found
        print(f"| {name} | {layers} | {backend} | {length:,} | {cells} | {told} |", flush=True)


def counted(config: CaduceusConfig, backend: str, length: int, recomputed: tuple[int, int], kept: int = 0) -> int:
    with on_fake_gpu() if backend == "triton" else contextlib.nullcontext():
        model = model_that_recomputes(config, backend, recomputed)
        model.keep_states(kept)
        with TensorBytesWithScratch() as live:
            forward_and_backward(model, length, backend == "triton")
        return live.peak + weight_and_moment_bytes(model)


def model_that_recomputes(config: CaduceusConfig, backend: str, recomputed: tuple[int, int]) -> CaduceusForMaskedLM:
    """`recomputed`: blocks recomputed whole, and others of which the scan's inputs are."""
    model = CaduceusForMaskedLM(config, backend=backend)
    model.recomputed_blocks, model.recomputed_scan_inputs = recomputed
    return model


def measure(config: CaduceusConfig, backend: str, length: int, recomputed: tuple[int, int]) -> int | str:
    if backend == "cpu":
        asked = json.dumps([config.d_model, config.n_layer, config.rcps, length, recomputed])
        command = [sys.executable, __file__, "--device", "cpu", "--measure", asked]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    try:
        with torch.device("cuda"):
            model = model_that_recomputes(config, backend, recomputed)
            forward_and_backward(model, 256, True)
            model.zero_grad()
            gpu = torch.device("cuda")
            return peak_bytes(gpu, partial(forward_and_backward, model, length, True)) + weight_and_moment_bytes(model)
    except torch.OutOfMemoryError:
        return "out of memory"
    finally:
        model = None
        gc.collect()
        torch.cuda.empty_cache()


def measure_on_cpu(d_model: int, layers: int, rcps: bool, length: int, recomputed: tuple[int, int]) -> int:
    """With the allocator that training has, in a process of its own: what was freed and kept would be used unseen."""
    keep_freed_memory(saving=any(recomputed))
    model = model_that_recomputes(CaduceusConfig(d_model=d_model, n_layer=layers, rcps=rcps), "cpu", recomputed)
    forward_and_backward(model, 8, False)  # loads the kernels
    model.zero_grad()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = resident("VmRSS")
    forward_and_backward(model, length, False)
    return resident("VmHWM") - before + weight_and_moment_bytes(model)


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def forward_and_backward(model: CaduceusForMaskedLM, length: int, bf16: bool) -> None:
    """Both passes for one sequence, all bases of which are labelled."""
    tokens = torch.full((1, length), 7, device=model.embedding.weight.device)
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=bf16):
        loss = model(tokens, tokens, return_logits=False).loss
    loss.backward()


def weight_and_moment_bytes(model: CaduceusForMaskedLM) -> int:
    return 3 * sum(parameter.nbytes for parameter in model.parameters())


class TensorBytesWithScratch(TensorBytes):
    """Looks into the launch code of the Triton ops, which one operator each would hide."""

    bodies = MappingProxyType(
        {
            op._opoverload: op._init_fn
            for module in (scan, conv, norm, cross_entropy)
            for op in vars(module).values()
            if isinstance(op, CustomOpDef)
        }
    )

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in self.bodies:
            with self:
                return self.bodies[function](*args, **(kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)


@contextlib.contextmanager
def on_fake_gpu() -> Iterator[None]:
    """Tensors without memory, on which launches allocate as for an H100 and start no kernel."""
    with contextlib.ExitStack() as stack:
        for kind in (JITFunction, InterpretedFunction):
            stack.enter_context(patch.object(kind, "run", lambda *_, **__: None))
        for module in (device, norm, cross_entropy):
            stack.enter_context(patch.object(module, "multiprocessors", lambda _: MULTIPROCESSORS))
        stack.enter_context(FakeTensorMode())
        yield


if __name__ == "__main__":
    main()
