"""The scan and the convolution on CPU, in one direction, beside other implementations of the same functions.

    python benchmarks/cpu_ops.py [--length 4096] [--peer-length 256] [--channels 512] [--states 16] [--seconds 10]

One sequence in fp32, with skip, gate and dt bias. All run in turns in one process, and the best time of each counts.
The slow implementations take a shorter sequence; a longer one does not raise their rate (the backward pass of a time
loop in autograd takes time quadratic in the length). The peers, if they are installed, are the scan of transformers'
Mamba in plain PyTorch, and the same with mambapy's parallel scan. `pip install -e '.[hub,dev]'` installs both, as does
`make bench`.
"""

import argparse
import datetime
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import caduceus  # isort: skip: before torch, as in training, since it sets what torch reads when imported
import torch
from machine import processor
from torch import Tensor

from caduceus.allocator import keep_freed_memory
from caduceus.ops import causal_conv1d, selective_scan


@dataclass
class Contender:
    name: str
    run: Callable[..., Tensor]
    inputs: list[Tensor]
    length: int

    def __post_init__(self) -> None:
        self.forward_seconds = self.both_seconds = float("inf")
        self.turns, self.seconds = 0, 0.0

    def take_turn(self) -> None:
        began = start = time.perf_counter()
        with torch.no_grad():
            y = self.run(*self.inputs)
        self.forward_seconds = min(self.forward_seconds, time.perf_counter() - start)
        gradient = torch.ones_like(y)
        start = time.perf_counter()
        torch.autograd.grad(self.run(*self.inputs), self.inputs, gradient)
        self.both_seconds = min(self.both_seconds, time.perf_counter() - start)
        self.turns += 1
        self.seconds += time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--peer-length", type=int, default=256, help="length for the slow ones (256)")
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--states", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10, help="time that each contender may take (10)")
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)

    print(f"{datetime.date.today()} · {processor()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    versions = f"torch {torch.__version__}, caduceus {caduceus.__version__}"
    print(f"{versions}, {options.channels} channels, {options.states} states, fp32\n")
    print("| op | implementation | length | forward, tokens/s | × | forward + backward, tokens/s | × |")
    print("|---|---|---|---|---|---|---|")
    for op, contenders in (("scan", _scans(options)), ("convolution", _convolutions(options))):
        while waiting := [c for c in contenders if c.turns < 2 or c.seconds < options.seconds]:
            for contender in waiting:  # its first turn compiles, and is never the best
                contender.take_turn()
        definition = contenders[0]
        for contender in contenders:
            rates = [contender.length / t for t in (contender.forward_seconds, contender.both_seconds)]
            base = [definition.length / t for t in (definition.forward_seconds, definition.both_seconds)]
            cells = " | ".join(f"{rate:,.0f} | {rate / b:,.1f}" for rate, b in zip(rates, base, strict=True))
            print(f"| {op} | {contender.name} | {contender.length:,} | {cells} |")


def _scans(options: argparse.Namespace) -> list[Contender]:
    def contender(name: str, backend: str, length: int) -> Contender:
        return Contender(name, lambda *t: selective_scan(*t, backend=backend), _scan_inputs(options, length), length)

    found = [
        contender("naive (the definition)", "naive", options.peer_length),
        contender("cpu", "cpu", options.length),
    ]
    if find_spec("transformers"):
        found.append(_peer("transformers' Mamba, time loop", options, use_mambapy=False))
        if find_spec("mambapy"):
            found.append(_peer("transformers' Mamba, mambapy's pscan", options, use_mambapy=True))
    return found


def _scan_inputs(options: argparse.Namespace, length: int) -> list[Tensor]:
    """u, dt, A, B, C, D, z, dt_bias as `selective_scan` takes them, with published initial values of A."""
    channels, states = options.channels, options.states
    u, dt, z = (torch.randn(1, length, channels) for _ in range(3))
    B, C = (torch.randn(1, length, states) for _ in range(2))
    A = -torch.arange(1.0, states + 1).repeat(channels, 1)
    tensors = [u, dt, A, B, C, torch.ones(channels), z, torch.full((channels,), -4.0)]
    return [t.requires_grad_() for t in tensors]


def _peer(name: str, options: argparse.Namespace, use_mambapy: bool) -> Contender:
    """transformers' scan, on its own layout (B, E, L)."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    def run(u, dt, A, B, C, D, z, dt_bias):
        return mamba_selective_scan(
            u, dt, A, B, C, D, z, delta_bias=dt_bias, delta_softplus=True, use_mambapy=use_mambapy
        )

    inputs = _scan_inputs(options, options.peer_length)
    inputs = [t.detach().transpose(1, 2).contiguous().requires_grad_() if t.ndim == 3 else t for t in inputs]
    return Contender(name, run, inputs, options.peer_length)


def _convolutions(options: argparse.Namespace) -> list[Contender]:
    channels = options.channels
    weight, bias = torch.randn(channels, 4).requires_grad_(), torch.randn(channels).requires_grad_()

    def contender(name: str, backend: str) -> Contender:
        x = torch.randn(1, options.length, channels).requires_grad_()
        return Contender(name, lambda *t: causal_conv1d(*t, backend=backend), [x, weight, bias], options.length)

    found = [contender("naive (the definition)", "naive"), contender("cpu", "cpu")]
    x = torch.randn(1, channels, options.length).requires_grad_()
    found.append(
        Contender("torch's conv1d and silu, on (B, E, L)", _torch_convolution, [x, weight, bias], options.length)
    )
    return found


def _torch_convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    channels, width = weight.shape
    y = torch.nn.functional.conv1d(x, weight[:, None], bias, padding=width - 1, groups=channels)
    return torch.nn.functional.silu(y[..., : x.shape[2]])


if __name__ == "__main__":
    main()
