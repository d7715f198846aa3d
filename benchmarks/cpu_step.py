"""One full training step on CPU (forward, backward, AdamW), beside the Mamba of Hugging Face transformers.

    python benchmarks/cpu_step.py [--d-model 128] [--n-layer 4] [--seq-len 256] [--batch 1] [--threads N] [--repeats 3]

All have the same width, depth, states and batch, and run in turns in one process. Without CUDA kernels, transformers'
Mamba takes a time loop in plain PyTorch, or mambapy's parallel scan if it is installed and asked for. It is
uni-directional: one scan per token and layer. Caduceus-Ph runs two (directions), and Caduceus-PS four (directions of
both strands). The table has the ratio of the steps, and of the time per scan.
"""

import argparse
import datetime
import os
import platform
import time
from collections.abc import Callable
from importlib.util import find_spec

import caduceus  # isort: skip: before torch, as in training, since it sets what torch reads when imported
import torch
import transformers
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from caduceus import CaduceusConfig, CaduceusForMaskedLM
from caduceus.allocator import keep_freed_memory
from caduceus.alphabet import IGNORE_LABEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--n-layer", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3, help="the best of so many turns counts (3)")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    torch.manual_seed(0)

    steps = {"transformers Mamba (uni-directional), time loop": (_transformers_step(options, use_mambapy=False), 1)}
    if find_spec("mambapy"):
        steps["transformers Mamba (uni-directional), mambapy"] = (_transformers_step(options, use_mambapy=True), 1)
    for name, keys, scans in (
        ("Caduceus code, uni-directional", {"bidirectional": False}, 1),
        ("Caduceus-Ph", {}, 2),
        ("Caduceus-PS", {"rcps": True}, 4),
    ):
        steps[name] = (_caduceus_step(options, keys), scans)
    seconds = _best_times({name: step for name, (step, _) in steps.items()}, options.repeats)

    tokens = options.batch * options.seq_len
    print(f"{datetime.date.today()} · {_processor()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"caduceus {caduceus.__version__}"
    )
    print(f"d_model {options.d_model}, {options.n_layer} layers, {options.batch} x {options.seq_len} tokens, fp32\n")
    print("| model | scans per token and layer | ms per step | tokens/s | times faster | times faster per scan |")
    print("|---|---|---|---|---|---|")
    baseline = next(iter(seconds.values()))
    for name, (_, scans) in steps.items():
        taken = seconds[name]
        ratio = baseline / taken
        print(
            f"| {name} | {scans} | {1e3 * taken:,.0f} | {tokens / taken:,.0f} | {ratio:,.1f} | {ratio * scans:,.1f} |"
        )


def _caduceus_step(options: argparse.Namespace, keys: dict) -> Callable[[], None]:
    config = CaduceusConfig(d_model=options.d_model, n_layer=options.n_layer, **keys)
    model = CaduceusForMaskedLM(config, backend="cpu")
    input_ids, labels = _batch(options)
    return _training_step(model, lambda: model(input_ids, labels, return_logits=False).loss)


def _transformers_step(options: argparse.Namespace, use_mambapy: bool) -> Callable[[], None]:
    config = MambaConfig(
        vocab_size=CaduceusConfig().padded_vocab_size,
        hidden_size=options.d_model,
        num_hidden_layers=options.n_layer,
        use_cache=False,
        use_mambapy=use_mambapy,
    )
    model = MambaForCausalLM(config)
    input_ids, labels = _batch(options)
    return _training_step(model, lambda: model(input_ids, labels=labels).loss)


def _batch(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    input_ids = torch.randint(7, 11, (options.batch, options.seq_len))
    return input_ids, torch.where(torch.rand(input_ids.shape) < 0.15, input_ids, IGNORE_LABEL)


def _training_step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _best_times(steps: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Best time of each over turns in which all run, so that all meet the same load of the machine."""
    best = dict.fromkeys(steps, float("inf"))
    for step in steps.values():
        step()  # compiles kernels, fills caches
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def _processor() -> str:
    with open("/proc/cpuinfo") as file:  # noqa: PTH123
        names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


if __name__ == "__main__":
    main()
