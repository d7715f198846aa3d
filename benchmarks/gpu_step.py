"""A whole training step on one GPU: correctness first, then speed, memory and the share of the measured roofline.

    python benchmarks/gpu_step.py [--lengths 1024 32768 131072 1048576] [--models ph ps] [--repeats 5]

bf16 autocast, fp32 parameters and states, AdamW, at least 131,072 tokens a step. Prints the device and its ceilings
(copy, exp2, bf16 products, measured in this run), the kernels' errors against fp64 and whether two runs give the same
bits, and one row per model and length: tokens/s, peak memory, share of the roofline, and the published structure on
the same card. Without a GPU it says so and exits with status 0. `--device cpu` runs the program itself at toy sizes.
"""

import argparse
import datetime
import time
from collections.abc import Callable
from functools import partial

import torch
from machine import processor
from published_structure import PublishedStructure
from torch import Tensor, nn

from caduceus.alphabet import IGNORE_LABEL
from caduceus.config import CaduceusConfig
from caduceus.model.caduceus import CaduceusForMaskedLM
from caduceus.ops import add_norm, bidirectional_conv1d, bidirectional_scan, head_cross_entropy, mamba_ssm

TOKENS = 131_072
"""Least tokens of a step: shorter sequences come in a batch."""
CHECKPOINTED = 1_048_576
"""Sequences of this length or more are run with activation checkpointing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 32_768, 131_072, 1_048_576])
    parser.add_argument("--models", nargs="+", choices=["ph", "ps"], default=["ph", "ps"])
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"least tokens of a step ({TOKENS})")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing to measure")
        return
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    backend = "triton" if options.device == "cuda" else "cpu"
    name = torch.cuda.get_device_name() if options.device == "cuda" else processor()
    print(f"{datetime.date.today()} · {name} · torch {torch.__version__} · backend {backend}\n")
    check_correctness(options.device, backend)
    ceilings = measure_ceilings(options.device)
    print("\nceilings, measured: " + ", ".join(f"{k} {v / 1e9:,.0f} {u}" for k, (v, u) in ceilings.items()) + "\n")

    peer_backend = "mamba_ssm" if options.device == "cuda" and mamba_ssm.missing() is None else backend
    print(
        f"| model | length | batch | tokens/s | peak GiB | of roofline | published structure ({peer_backend}) | times |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for model in options.models:
        config = CaduceusConfig(d_model=options.d_model, n_layer=options.layers, rcps=model == "ps")
        for length in options.lengths:
            batch = max(1, options.tokens // length)
            checkpointed = length >= CHECKPOINTED
            ours, theirs = (
                measure(partial(build, config, name, checkpointed, batch, length, options.device), options)
                for build, name in ((our_step, backend), (published_step, peer_backend))
            )
            print(row(model, length, batch, ours, theirs, roofline_seconds(config, checkpointed, ceilings)), flush=True)


def row(model: str, length: int, batch: int, ours: tuple | None, theirs: tuple | None, least: float) -> str:
    def rate(result: tuple | None) -> str:
        return "out of memory" if result is None else f"{batch * length / result[0]:,.0f}"

    peak = "-" if ours is None or not ours[1] else f"{ours[1] / 2**30:.1f}"
    share = "-" if ours is None else f"{least * batch * length / ours[0]:.0%}"
    times = "-" if ours is None or theirs is None else f"{theirs[0] / ours[0]:.2f}"
    return f"| {model} | {length} | {batch} | {rate(ours)} | {peak} | {share} | {rate(theirs)} | {times} |"


def our_step(
    config: CaduceusConfig, backend: str, checkpointed: bool, batch: int, length: int, device: str
) -> Callable:
    with torch.device(device):
        recomputed = config.n_layer if checkpointed else 0
        model = CaduceusForMaskedLM(config, backend=backend, checkpoint_blocks=recomputed)
        input_ids, labels = make_batch(batch, length)
    return training_step(model, lambda: model(input_ids, labels, return_logits=False).loss, device)


def published_step(
    config: CaduceusConfig, backend: str, checkpointed: bool, batch: int, length: int, device: str
) -> Callable:
    with torch.device(device):
        model = PublishedStructure(config, backend, checkpointed)
        input_ids, labels = make_batch(batch, length)
    return training_step(model, lambda: model(input_ids, labels, IGNORE_LABEL), device)


def make_batch(batch: int, length: int) -> tuple[Tensor, Tensor]:
    input_ids = torch.randint(7, 11, (batch, length))
    return input_ids, torch.where(torch.rand(input_ids.shape) < 0.15, input_ids, IGNORE_LABEL)


def training_step(model: nn.Module, loss: Callable[[], Tensor], device: str) -> Callable[[], Tensor]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device == "cuda")

    def step() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return step


def measure(build: Callable[[], Callable], options: argparse.Namespace) -> tuple[float, int] | None:
    """(best seconds of a step, peak bytes); None where it does not fit."""
    try:
        step = build()
        step()  # compiles the kernels
        reset_peak(options.device)
        best = min(seconds(step, options.device) for _ in range(options.repeats))
        return best, peak(options.device)
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        step = None
        if options.device == "cuda":
            torch.cuda.empty_cache()


def seconds(run: Callable, device: str) -> float:
    if device == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else 0


def measure_ceilings(device: str) -> dict[str, tuple[float, str]]:
    """Bytes/s of a copy (read and written), exp2/s, and FLOP/s of a bf16 product."""
    size = 2**30 if device == "cuda" else 2**24
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(5))
    side = 8192 if device == "cuda" else 512
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = min(seconds(lambda: a @ b, device) for _ in range(5))
    return {
        "copy": (2 * size / copy, "GB/s"),
        "exp2": (measure_exp2(source, target, device), "Gexp/s"),
        "bf16 products": (2 * side**3 / product, "GFLOP/s"),
    }


def measure_exp2(source: Tensor, target: Tensor, device: str) -> float:
    if device == "cpu":
        return source.numel() / min(seconds(lambda: torch.exp2(source, out=target), device) for _ in range(5))
    from exp2_kernel import BLOCK, REPEATS, exp2_kernel

    programs = source.numel() // BLOCK.value
    run = lambda: exp2_kernel[(programs,)](source, target)  # noqa: E731
    run()
    return programs * BLOCK.value * REPEATS.value / min(seconds(run, device) for _ in range(5))


def roofline_seconds(config: CaduceusConfig, checkpointed: bool, ceilings: dict) -> float:
    """Least seconds per token: bytes, exps and products each at its ceiling, the slowest of the three.

    Per token and layer, forward + backward, S strands and two directions: products of the projections (3 x forward);
    one exp per state, direction and strand in each pass; bf16 activations read and written by projections, convolution,
    scan, norm and residual once each in forward and twice in backward. Checkpointing adds one more forward.
    """
    D, E, N, R, S = config.d_model, config.d_inner, config.d_state, config.dt_rank, 2 if config.rcps else 1
    forward_products = 2 * S * (D * 2 * E + E * D + 2 * (E * (R + 2 * N) + R * E))
    forward_exps = S * 2 * E * N
    # residual add and norm 2D -> 2D, in_proj D -> 2E, conv E -> 2E, x_proj 2E -> 2(R + 2N), dt_proj 2R -> 2E,
    # scan 2E u, 2E dt, 4N, E z -> E, out_proj E -> D
    elements = 4 * D + (D + 2 * E) + 3 * E + (2 * E + 2 * (R + 2 * N)) + (2 * R + 2 * E)
    elements += (5 * E + 4 * N + E) + (E + D)
    passes = 4 if checkpointed else 3
    work = {
        "bf16 products": passes * forward_products,
        "exp2": (3 if checkpointed else 2) * forward_exps,
        "copy": passes * 2 * S * elements,
    }
    return config.n_layer * max(amount / ceilings[name][0] for name, amount in work.items())


def check_correctness(device: str, backend: str) -> None:
    """The ops with all gradients, over two directions and strands, against fp64; and the same bits twice."""
    print("| ops | dtype | largest error, relative to the largest value | same bits in two runs |\n|---|---|---|---|")
    for name, make, run in (
        ("convolution and scan", make_operands, mix),
        ("norm and loss", make_head_operands, predict),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            operands = make(device, dtype)
            reference = run([t.double() for t in operands], "naive")
            first, second = (run(operands, backend) for _ in range(2))
            error = max(
                ((right - found.double()).abs().max() / right.abs().max()).item()
                for right, found in zip(reference, first, strict=True)
            )
            same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {error:.1e} | {'yes' if same else 'NO'} |")
            # 24 bits through sums of hundreds of terms; 8 bits, rounded at the convolution and twice in the scan.
            assert error < {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype], "the kernels are wrong: no timings"


def make_operands(device: str, dtype: torch.dtype) -> list[Tensor]:
    S, P, batch, length, E, N, K = 2, 2, 2, 333, 200, 16, 4
    generator = torch.Generator().manual_seed(0)
    shapes = [(S, batch, length, E), (P, E, K), (P, E), (P, S, batch, length, E)]
    shapes += [(P, E, N), (P, S, batch, length, N), (P, S, batch, length, N), (P, E), (S, batch, length, E), (P, E)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[3] -= 4  # step sizes of some hundredths, as in training
    tensors[4] = -tensors[4].abs() - 0.1
    activations = (0, 3, 5, 6, 8)
    return [t.to(device, dtype if i in activations else torch.float32) for i, t in enumerate(tensors)]


def mix(operands: list[Tensor], backend: str) -> list[Tensor]:
    """Output and gradients of convolution and scan."""
    leaves = [t.detach().requires_grad_() for t in operands]
    x, weight, bias, dt, A, B, C, D, z, dt_bias = leaves
    u = bidirectional_conv1d(x, weight, bias, backend=backend)
    y = bidirectional_scan(u, dt, A, B, C, D, z, dt_bias, backend=backend)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, torch.bfloat16).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, gradient)]


def make_head_operands(device: str, dtype: torch.dtype) -> list[Tensor]:
    S, batch, length, D, V = 2, 2, 333, 200, 16
    generator = torch.Generator().manual_seed(0)
    shapes = (S, batch, length, D), (S, batch, length, D), (S, D), (S, V, D)
    hidden, *others = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return [hidden.to(dtype), *others]


def predict(operands: list[Tensor], backend: str) -> list[Tensor]:
    """The final norm and the loss at half of the tokens, with gradients."""
    leaves = [t.detach().requires_grad_() for t in operands]
    hidden, residual, norm, head = leaves
    labels = torch.randint(7, 11, hidden.shape[1:3], generator=torch.Generator().manual_seed(1))
    labels[:, ::2] = IGNORE_LABEL
    normed, _ = add_norm(hidden, residual, norm, eps=1e-5, backend=backend)
    loss, _ = head_cross_entropy(normed, head, labels.to(hidden.device), ignore_label=IGNORE_LABEL, backend=backend)
    return [normed, loss, *torch.autograd.grad(loss, leaves)]


if __name__ == "__main__":
    main()
