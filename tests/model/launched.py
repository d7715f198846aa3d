"""Prints how many kernels and operators a step of some models launches: a JSON object for each of them.

A program, as it leaves the operators patched.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.traffic import recording
from caduceus.config import CaduceusConfig
from caduceus.model.heads import CaduceusForMaskedLM
from tests.ops import aot

LENGTH, LAYERS = 1024, 3
MODELS = [
    ({}, False, (0, 0)),
    ({"rcps": True}, False, (0, 0)),
    ({}, True, (0, 0)),
    ({}, False, (2, 1)),
    ({"mixer": "mamba2", "headdim": 16}, False, (0, 0)),
]
"""Keys of the model, whether ranks share the sequence, and blocks that are recomputed."""


def launches(model: dict, shared: bool, recomputed: tuple[int, int]) -> int:
    config = CaduceusConfig(**model)
    with aot.compiling(90, names=("none",)), recording(LENGTH) as found:
        whole, inputs = recomputed
        network = CaduceusForMaskedLM(config, "triton", recomputed_blocks=whole, recomputed_scan_inputs=inputs)
        if shared:
            network.share_sequences(aot.SharedSequence())
        ids = torch.zeros(1, LENGTH, dtype=torch.long)
        for _ in range(2 if shared else 1):  # what ranks share is made once
            network.zero_grad()
            before = sum(traffic.launches for traffic in found.values())
            with torch.autocast("cpu", torch.bfloat16):
                loss = network(ids, labels=ids, loss_weights=torch.ones(1, LENGTH), return_logits=False).loss
            loss.backward()
        return sum(traffic.launches for traffic in found.values()) - before


for keys, is_shared, again in MODELS:
    sizes = {"d_model": 64, "n_layer": LAYERS, **keys}
    told = {"model": sizes, "shared": is_shared, "recomputed": again, "length": LENGTH}
    print(json.dumps({**told, "launches": launches(sizes, is_shared, again)}))
