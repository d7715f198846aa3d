"""Bases a second that the tokenizer of exports takes on one core, to ids and attention mask for `transformers`.

    python benchmarks/tokenizer.py [--repeats 9]

Processor time, the best of the repeats. The strings have A, C, G, T in both cases and N, and become (B, L) int64 of
torch.
"""

import argparse
import datetime
import os
import time

import numpy as np
import torch
import transformers
from machine import processor

import caduceus
from caduceus.hub.auto.tokenization_caduceus import CaduceusTokenizer

SHAPES = ((1, 1 << 24), (1, 1 << 20), (8, 1 << 17), (1024, 1024))
CASES = {
    "ids and mask": {},
    "padded, ids and mask": {"padding": True},
    "ids alone": {"return_attention_mask": False},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(f"{datetime.date.today()} · {processor()}, 1 thread, load {os.getloadavg()[0]:.1f}")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, caduceus {caduceus.__version__}\n")
    print(f"| strings | {' | '.join(f'{case}, M bases/s' for case in CASES)} |")
    print("|---|" + "---|" * len(CASES))
    for rows, length in SHAPES:
        texts = strings(rows, length)
        rates = [f"{rate(texts, options, repeats) / 1e6:.0f}" for options in CASES.values()]
        print(f"| {rows:,} x {length:,} bases | {' | '.join(rates)} |")


def strings(rows: int, length: int) -> list[str]:
    """Random bases of both cases, and N."""
    rng = np.random.default_rng(0)
    bases = rng.choice(np.frombuffer(b"ACGTacgtN", np.uint8), (rows, length))
    return [row.tobytes().decode() for row in bases]


def rate(texts: list[str], options: dict, repeats: int) -> float:
    """Bases a second of processor time, at best."""
    tokenizer, seconds = CaduceusTokenizer(), []
    for _ in range(repeats):
        started = time.process_time()
        tokenizer(texts, return_tensors="pt", **options)
        seconds.append(time.process_time() - started)
    return sum(map(len, texts)) / min(seconds)


if __name__ == "__main__":
    main()
