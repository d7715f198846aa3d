"""Prints how many kernels and operators a step of some models launches: a JSON object for each of them.

A program, as it leaves the operators patched.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import traffic
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
    whole, inputs = recomputed
    with aot.compiling(90, names=("none",)):
        network = CaduceusForMaskedLM(
            CaduceusConfig(**model), "triton", recomputed_blocks=whole, recomputed_scan_inputs=inputs
        )
        if shared:
            network.share_sequences(aot.SharedSequence())
        for _ in range(2 if shared else 1):  # what ranks share is made once
            network.zero_grad()
            found = traffic.step(network, 1, LENGTH, "bf16")
        return sum(traffic.launches(found))


for keys, is_shared, again in MODELS:
    sizes = {"d_model": 64, "n_layer": LAYERS, **keys}
    told = {"model": sizes, "shared": is_shared, "recomputed": again, "length": LENGTH}
    print(json.dumps({**told, "launches": launches(sizes, is_shared, again)}))
