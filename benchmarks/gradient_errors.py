"""How far dB and dC of the scan are from fp64, for each way of summing over channels, side by side.

    python benchmarks/gradient_errors.py [--device cpu] [--channels 512] [--length 16] [--states 4]

Operands are rounded to the type of a row, and the definition is computed in fp64 from the same operands. The gradients
are those that the kernels write, rounded to their type. Errors are relative to the root mean square of the gradient:
rms, largest, and bias (the mean of the error times the sign of the gradient). Kept states are those of
`train.keep_states`. `as rounded` is fp64 rounded to the row's type; no way of summing can be nearer.

With `--device cpu` Triton interprets the kernels, and multiplies as tensor cores do
(tests/ops/interpreted/conftest.py): operands are truncated to TF32, and arithmetic takes the place of the assembly of
sums in a warp. Roundings to bf16 are truncations there, unlike on a GPU.
"""

import datetime
import sys
from pathlib import Path

from gpu import CommandLine, device_name, positive  # isort: skip: before caduceus

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))  # the tests are not installed

from caduceus import ops
from caduceus.ops.operands import ScanOperands
from caduceus.ops.triton import scan, scan_launches

NAMES = ("u", "dt", "A", "B", "C", "D", "z", "dt_bias")
IN_TYPE = ("u", "dt", "B", "C", "z")
WAYS = {
    "fp32": (torch.float32, True, False),
    "fp32, kept states": (torch.float32, True, True),
    "fp16, tiles (TF32)": (torch.float16, True, False),
    "bf16, tiles (TF32)": (torch.bfloat16, False, False),
    "bf16, in warps": (torch.bfloat16, True, False),
    "bf16, in warps, kept states": (torch.bfloat16, True, True),
}
"""Type, whether sums may stay in a warp, whether states are kept."""


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--channels", type=positive, default=512)
    parser.add_argument("--length", type=positive, default=16)
    parser.add_argument("--states", type=positive, default=4)
    options = parser.parse_or_leave()
    if options.device == "cpu":
        import tests.ops.interpreted.conftest  # noqa: F401  It changes the interpreter.
    E, L, N = options.channels, options.length, options.states
    print(f"{datetime.date.today()} · {device_name(options.device)} · {E} channels, {L} tokens, {N} states\n")
    print("| way | dB rms | dB largest | dB bias | dC rms | dC largest | dC bias |\n|---|---|---|---|---|---|---|")
    operands = make_operands(E, L, N, options.device)
    exact: dict[torch.dtype, tuple[Tensor, ...]] = {}
    for way, (dtype, in_warps, keep) in WAYS.items():
        given = {n: t.to(dtype if n in IN_TYPE else torch.float32) for n, t in operands.items()}
        if dtype not in exact:
            exact[dtype] = gradients({n: t.double() for n, t in given.items()}, "naive", False)
            rounded = tuple(t.to(dtype) for t in exact[dtype])
            print_row(f"{str(dtype).removeprefix('torch.')}, as rounded", rounded, exact[dtype])
        scan_launches.warp_sums = in_warps
        print_row(way, gradients(given, "triton", keep), exact[dtype])


def make_operands(E: int, L: int, N: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    values = normal(2, 1, 1, L, E), normal(2, 1, 1, L, E) - 1, -normal(2, E, N).abs() - 0.1
    values += normal(2, 1, 1, L, N), normal(2, 1, 1, L, N), normal(2, E), normal(1, 1, L, E), 0.1 * normal(2, E)
    return dict(zip(NAMES, values, strict=True))


def gradients(given: dict[str, Tensor], backend: str, keep: bool) -> tuple[Tensor, ...]:
    """dB and dC, of a gradient of the output that any type holds exactly."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in given.items()}
    if backend == "triton":
        y, _ = scan.scan_with_states(ScanOperands(*leaves.values()), chunk=8, keep=keep)
    else:
        y = ops.bidirectional_scan(**leaves, backend=backend)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.device, y.dtype)
    return torch.autograd.grad(y, (leaves["B"], leaves["C"]), dy)


def print_row(way: str, found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> None:
    cells = []
    for gradient, right in zip(found, exact, strict=True):
        error, scale = gradient.double() - right, right.square().mean().sqrt()
        told = error.square().mean().sqrt(), error.abs().max(), (error * right.sign()).mean()
        cells += [f"{(value / scale).item():.1e}" for value in told]
    print(f"| {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
