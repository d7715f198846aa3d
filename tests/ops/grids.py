"""Prints what a step of two blocks launches for sequences of up to 8 million bases, nothing of it compiled.

One JSON object for each length and model: launches are pairs of a kernel and its grid.
"""

import json

from triton.runtime.jit import JITFunction

from caduceus.config import CaduceusConfig
from tests.ops.aot import compiling, train

LENGTHS = (131_072, 2**20, 2**20 + 2**17, 2**23)


def main() -> None:
    launches: list[tuple[str, tuple[int, ...]]] = []

    def run(kernel, *arguments, grid, **options):
        launches.append((kernel.fn.__name__.removesuffix("_kernel"), grid))

    with compiling(90):
        JITFunction.run = run
        for rcps, shared in ((False, False), (True, False), (False, True)):
            for length in LENGTHS:
                launches.clear()
                train(CaduceusConfig(d_model=256, n_layer=2, rcps=rcps), 1, length, "bf16", shared=shared)
                print(json.dumps({"length": length, "streams": 1 + rcps, "shared": shared, "launches": launches}))


if __name__ == "__main__":
    main()
