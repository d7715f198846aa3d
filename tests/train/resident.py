"""Trains two micro-batches on the CPU with `train.activation_checkpointing` as given, and prints a JSON object: bytes
of resident memory at the peak, bytes of tensors as counted, and what `auto` said that it would take.

    python tests/train/resident.py MODE FREE_BYTES
"""

import gc
import json
import logging
import re
import sys
from pathlib import Path
from unittest.mock import patch

import torch

from caduceus.config import Config, config_from_dict
from caduceus.distributed.build import build_strategy
from caduceus.distributed.ranks import Ranks
from caduceus.train import memory, recomputation
from caduceus.train.optimizer import build_optimizer

LENGTH, LAYERS = 16_384, 4


def configuration(mode: str) -> Config:
    model = {"d_model": 32, "n_layer": LAYERS, "rcps": True}
    train = {"activation_checkpointing": mode, "micro_batch": 1, "global_batch": 1}
    return config_from_dict({"model": model, "train": train, "data": {"seq_len": LENGTH}, "run": {"device": "cpu"}})


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main(mode: str, free: int) -> None:
    config = configuration(mode)
    memory.keep_freed_memory_for(config)
    strategy = build_strategy(config, Ranks(0, 1, 1, torch.device("cpu")), build_optimizer)
    tokens = torch.full((1, 64), 7)
    strategy.model(tokens, tokens, return_logits=False).loss_sum.sum().backward()  # loads the kernels
    strategy.discard_gradients()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, said = resident("VmRSS"), []
    if mode == "auto":
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        recomputation._log.addHandler(handler)
        recomputation._log.setLevel(logging.INFO)
        with patch.object(memory, "free_memory", lambda _: free):
            recomputation.recompute_to_fit(config, strategy)
        said = [float(n.replace(",", "")) * 2**20 for n in re.findall(r"then take ([\d,]+) MiB", said[0])]
    counted = memory.peak_bytes(torch.device("cpu"), lambda: recomputation.run_micro_batch(config, strategy))
    for _ in range(2):
        recomputation.run_micro_batch(config, strategy)
        strategy.step(1e-3)
    print(json.dumps({"resident": resident("VmHWM") - before, "counted": counted, "said": said}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
