"""Training steps of Mamba-2's mixer on a CPU: against Mamba's at equal width, and against transformers' Mamba2.

    python benchmarks/mamba2.py [--length 1024]

All run in turns in one process. A step is forward and backward of a uni-directional model of two layers, because
`transformers` has no other; without a GPU its Mamba2 runs in plain torch.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.machine import processor
from caduceus import CaduceusConfig, CaduceusForMaskedLM

WIDTH, LAYERS, HEAD, REPEATS = 256, 2, 64, 3


def main() -> None:
    """Print a table of seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=1024)
    options = parser.parse_args()
    torch.manual_seed(0)
    input_ids = torch.randint(7, 11, (1, options.length))
    common = {"d_model": WIDTH, "n_layer": LAYERS, "bidirectional": False}
    models = {
        "mamba, 16 states": ours(CaduceusConfig(**common), input_ids),
        "mamba2, 16 states": ours(CaduceusConfig(**common, mixer="mamba2", headdim=HEAD), input_ids),
        "mamba2, 64 states": ours(CaduceusConfig(**common, mixer="mamba2", headdim=HEAD, d_state=64), input_ids),
        "transformers' Mamba2, 64 states": theirs(input_ids),
    }
    best = dict.fromkeys(models, float("inf"))
    for _ in range(REPEATS + 1):  # the first compiles
        for name, step in models.items():
            started = time.perf_counter()
            step()
            best[name] = min(best[name], time.perf_counter() - started)
    print(f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"d_model {WIDTH}, {LAYERS} layers, {options.length} bases\n")
    print("| mixer | seconds a step | bases/s | times mamba's seconds |\n|---|---|---|---|")
    for name, seconds in best.items():
        ratio = seconds / best["mamba, 16 states"]
        print(f"| {name} | {seconds:.3f} | {options.length / seconds:,.0f} | {ratio:.2f} |")


def ours(config: CaduceusConfig, input_ids: torch.Tensor) -> Callable[[], None]:
    model = CaduceusForMaskedLM(config)

    def step() -> None:
        model.zero_grad()
        model(input_ids, input_ids, return_logits=False).loss.backward()

    return step


def theirs(input_ids: torch.Tensor) -> Callable[[], None]:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": 16, "state_size": 64, "expand": 2}
    config = Mamba2Config(
        **sizes, head_dim=HEAD, num_heads=2 * WIDTH // HEAD, n_groups=1, chunk_size=64, use_cache=False
    )
    model = Mamba2ForCausalLM(config).train()

    def step() -> None:
        model.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()

    return step


if __name__ == "__main__":
    main()
