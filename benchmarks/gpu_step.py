"""A whole training step on one GPU: speed, memory and the share of the measured roofline.

    python benchmarks/gpu_step.py
        [--lengths 1024 32768 131072 1048576] [--models ph ps] [--repeats 5]

It times the trainer's own `training_step`, with clipping, schedule, guards and the row that is logged, on batches that
are already there: bf16 autocast, fp32 parameters and states, AdamW, as many sequences as 131,072 tokens hold (at least
one), without and with `train.cuda_graphs`. It prints

- the device, and on a GPU whether the kernels are right (all of gpu_correctness.py except its giant tensors; if they
  are not, it ends there with status 1);
- the ceilings, measured in this run: copy, exp2, bf16 products;
- one row per model and length: tokens/s, peak memory, blocks recomputed (whole + only what feeds the scan, as
  `train.activation_checkpointing: auto` takes), share of the roofline, tokens/s with graphs, and the published
  structure on the same card, clipped in the same way, with its blocks recomputed if it does not fit otherwise.

The peer is only the structure (published_structure.py). Its norm and residual add are not fused, its mixer is not the
one fused function that recomputes convolution and step sizes, and nothing of it is compiled. So `times` and its memory
look better for this package than they would against the published package. Without mamba_ssm the peer runs on this
package's own kernels, and the row says nothing about the published speed.

Without a GPU it says so and exits with status 0. `--device cpu` runs the program itself, at sizes that you give.
"""

import argparse
import datetime
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from gpu import CommandLine, device_name, give_memory_back, positive
from gpu_correctness import all_right, make_batch
from published_structure import PublishedStructure
from torch import Tensor, nn

from caduceus.alphabet import IGNORE_LABEL
from caduceus.config import CaduceusConfig, Config, config_from_dict
from caduceus.data.batch import Batch
from caduceus.distributed.build import build_strategy
from caduceus.distributed.ranks import Ranks
from caduceus.errors import UserError
from caduceus.monitor.rows import Monitor
from caduceus.ops import mamba_ssm
from caduceus.run.directory import RunDirectory
from caduceus.train.handover import Handover
from caduceus.train.optimizer import build_optimizer
from caduceus.train.progress import Progress
from caduceus.train.recomputation import recompute_to_fit
from caduceus.train.step import training_step

TOKENS = 131_072
"""Least tokens of a step: shorter sequences come in a batch."""


class Measured(NamedTuple):
    seconds: float
    """The best of a step."""
    peak_bytes: int
    recomputed: tuple[int, int]
    """Blocks that the backward pass computes again whole, and others of which it does what feeds the scan."""


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--lengths", type=positive, nargs="+", default=[1024, 32_768, 131_072, 1_048_576])
    parser.add_argument("--models", nargs="+", choices=["ph", "ps"], default=["ph", "ps"])
    parser.add_argument("--d-model", type=positive, default=256)
    parser.add_argument("--layers", type=positive, default=16)
    parser.add_argument("--tokens", type=positive, default=TOKENS, help=f"least tokens of a step ({TOKENS})")
    parser.add_argument("--repeats", type=positive, default=5)
    options = parser.parse_or_leave()
    backend = "triton" if options.device == "cuda" else "cpu"
    name = device_name(options.device)
    print(f"{datetime.date.today()} · {name} · torch {torch.__version__} · backend {backend}\n", flush=True)
    if options.device == "cuda" and not all_right(("ops", "golden", "bits"), options.device):
        sys.exit(1)
    ceilings = measure_ceilings(options.device)
    print("ceilings, measured: " + ", ".join(f"{k} {v / 1e9:,.0f} {u}" for k, (v, u) in ceilings.items()) + "\n")

    reason = mamba_ssm.missing() if options.device == "cuda" else "runs on GPUs only"
    peer_backend = backend if reason else "mamba_ssm"
    if reason:
        print(
            f"mamba_ssm {reason}: the last two columns compare STRUCTURES on our own kernels ({backend}), "
            "not with the published code"
        )
        print(
            f"({mamba_ssm.INSTALL})\n"
            if options.device == "cuda"
            else "and exp2 was interpreted: shares mean nothing\n"
        )
    peer = f"our {backend} kernels" if reason else "mamba_ssm"
    print(
        "| model | length | batch | tokens/s | peak GiB | blocks recomputed | of roofline | tokens/s with graphs "
        f"| published structure on {peer} | times{' (structure)' if reason else ''} |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for model in options.models:
        config = CaduceusConfig(d_model=options.d_model, n_layer=options.layers, rcps=model == "ps")
        for length in options.lengths:
            batch = max(1, options.tokens // length)
            size = batch, length, options.device
            ours = measure(partial(our_step, config, backend, "none", *size), options)
            replayed = None
            if options.device == "cuda":
                replayed = measure(partial(our_step, config, backend, "passes", *size), options)
            theirs = measure(partial(published_step, config, peer_backend, False, *size), options)
            if theirs is None:
                theirs = measure(partial(published_step, config, peer_backend, True, *size), options)
            print(row(model, config, batch, length, ours, replayed, theirs, ceilings), flush=True)


def row(
    model: str,
    config: CaduceusConfig,
    batch: int,
    length: int,
    ours: Measured | None,
    replayed: Measured | None,
    theirs: Measured | None,
    ceilings: dict,
) -> str:
    def rate(result: Measured | None) -> str:
        return "does not fit" if result is None else f"{batch * length / result.seconds:,.0f}"

    peak = recomputed = share = times = "-"
    if ours is not None:
        peak = f"{ours.peak_bytes / 2**30:.1f}" if ours.peak_bytes else "-"
        recomputed = "{} + {} of {}".format(*ours.recomputed, config.n_layer)
        share = f"{roofline_seconds(config, ours.recomputed, ceilings) * batch * length / ours.seconds:.0%}"
        times = "-" if theirs is None else f"{theirs.seconds / ours.seconds:.2f}"
    graphs = "-" if replayed is None else rate(replayed)
    columns = (model, length, batch, rate(ours), peak, recomputed, share, graphs, rate(theirs), times)
    return f"| {' | '.join(map(str, columns))} |"


def our_step(
    model: CaduceusConfig, backend: str, graphs: str, batch: int, length: int, device: str
) -> tuple[Callable, tuple[int, int]]:
    """A step of the trainer's, and how much it recomputes: what the trainer finds for this micro-batch."""
    directory = tempfile.TemporaryDirectory()
    config = config_from_dict(
        {
            "model": vars(model),
            "ops": {"backend": backend},
            "data": {"path": directory.name, "seq_len": length},
            "train": {
                "micro_batch": batch,
                "global_batch": batch,
                "precision": "bf16",
                "activation_checkpointing": "auto",
                "cuda_graphs": graphs,
            },
            "run": {"dir": f"{directory.name}/run", "name": "gpu_step", "device": device},
            "wandb": {"mode": "disabled"},
        }
    )
    strategy = build_strategy(config, Ranks(0, 1, 1, torch.device(device)), build_optimizer)
    recompute_to_fit(config, strategy)
    loader = OneBatch(config, *make_batch(batch, length, device))
    progress, batches = Progress.first(config, loader), itertools.repeat(loader.batch)
    monitor = Monitor(config, RunDirectory.create_or_resume(config), active=True, shown=False)

    handover = Handover()

    def step(directory: tempfile.TemporaryDirectory = directory) -> None:  # which is there as long as the step
        training_step(config, strategy, loader, batches, progress, handover)
        for row in handover.complete():
            monitor.log_training(row)

    return step, (strategy.model.recomputed_blocks, strategy.model.recomputed_scan_inputs)


class OneBatch:
    """A loader whose batches are one that is on the device already."""

    per_step, substituted, species = 1, 0, ("random",)

    def __init__(self, config: Config, input_ids: Tensor, labels: Tensor) -> None:
        self.global_batch = config.train.global_batch
        self.batch = Batch(input_ids, labels, None, torch.arange(self.global_batch))
        self.batch.counted = self.batch.label_weight().cpu()

    def state(self) -> dict:
        return {"fingerprint": "", "seed": 0, "samples_consumed": 0}


def published_step(
    config: CaduceusConfig, backend: str, checkpointed: bool, batch: int, length: int, device: str
) -> tuple[Callable, tuple[int, int]]:
    with torch.device(device):
        model = PublishedStructure(config, backend, checkpointed)
    input_ids, labels = make_batch(batch, length, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=device == "cuda")

    def step() -> float:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids, labels, IGNORE_LABEL)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, (config.n_layer if checkpointed else 0, 0)


def measure(build: Callable[[], tuple[Callable, tuple[int, int]]], options: argparse.Namespace) -> Measured | None:
    """None where it does not fit, or is refused, which is then told."""
    result = step = None
    try:
        step, recomputed = build()
        step()  # compiles the kernels
        reset_peak(options.device)
        best = min(seconds(step, options.device) for _ in range(options.repeats))
        result = Measured(best, peak(options.device), recomputed)
    except torch.OutOfMemoryError:
        pass
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
    del step
    give_memory_back(options.device)
    return result


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
    from exp2_kernel import BLOCK, REPEATS, exp2_kernel

    from caduceus.ops.triton.device import LAUNCH

    programs = source.numel() // BLOCK.value if device == "cuda" else 2
    run = lambda: exp2_kernel[(programs,)](source, target, **LAUNCH)  # noqa: E731
    run()
    return programs * BLOCK.value * REPEATS.value / min(seconds(run, device) for _ in range(5))


def roofline_seconds(config: CaduceusConfig, recomputed: tuple[int, int], ceilings: dict) -> float:
    """Least seconds per token: bytes, exps and products each at its ceiling, the slowest of the three.

    Per token and layer, forward + backward, S strands and two directions: products of the projections (3 x forward);
    one exp per state, direction and strand in each pass; bf16 activations, and the residual in its own type, read and
    written by projections, convolution, scan, norm and residual once each in forward and twice in backward. A
    block that is recomputed whole adds one more forward; one of which the scan's inputs are, theirs.
    """
    D, E, N, R, S = config.d_model, config.d_inner, config.d_state, config.dt_rank, 2 if config.rcps else 1
    input_products = 2 * S * 2 * (E * (R + 2 * N) + R * E)
    forward_products = 2 * S * (D * 2 * E + E * D) + input_products
    forward_exps = S * 2 * E * N
    # norm D -> D, in_proj D -> 2E, conv E -> 2E, x_proj 2E -> 2(R + 2N), dt_proj 2R -> 2E,
    # scan 2E u, 2E dt, 4N, E z -> E, out_proj E -> D
    input_elements = 3 * E + (2 * E + 2 * (R + 2 * N)) + (2 * R + 2 * E)
    elements = 2 * D + (D + 2 * E) + input_elements + (5 * E + 4 * N + E) + (E + D)
    residual = 2 * D * (4 if config.residual_in_fp32 else 2)  # read and written
    whole, inputs = (blocks / config.n_layer for blocks in recomputed)
    work = {
        "bf16 products": (3 + whole) * forward_products + inputs * input_products,
        "exp2": (2 + whole) * forward_exps,
        "copy": S * ((3 + whole) * (2 * elements + residual) + inputs * 2 * input_elements),
    }
    return config.n_layer * max(amount / ceilings[name][0] for name, amount in work.items())


if __name__ == "__main__":
    main()
