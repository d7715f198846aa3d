"""What a checkpoint costs the first rank besides its own files: the plans and results of all ranks that write.

    python benchmarks/checkpoint_ranks.py [--config ps-131k] [--ranks 64 512]

The times are processor time in one process, which plays the first rank: it unpickles what the others plan to write,
makes the common plan, pickles it for them, and unpickles what they have written. This holds Python's lock, so training
waits meanwhile. The writers are `all` ranks (each plans a whole copy), the ranks of one `copy` that 8 share, or `one`.
"""

import argparse
import pickle
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.checkpoint.storage import WriteResult

from caduceus.config import load_config
from caduceus.distributed.build import build_model
from caduceus.distributed.initialisation import initialise
from caduceus.train.optimizer import build_optimizer

COPY = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="ps-131k")
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 512])
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = load_config(options.config, [])
    model = build_model(config)
    initialise(model, config.train, torch.device("cpu"))
    optimizer = build_optimizer(model, config.train)
    state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
    print("ranks  written by    s of the first rank")
    for ranks in options.ranks:
        for name, writers in (("all", ranks), ("copy", COPY), ("one", 1)):
            print(f"{ranks:5}  {name:10}  {cost(state, writers):8.2f}", flush=True)


def cost(state: dict[str, Any], writers: int) -> float:
    """Seconds that the first of so many writers is busy with the others."""
    planner, other = planner_of(state, True), planner_of(state, False)
    plan, message = planner.create_local_plan(), pickle.dumps(other.create_local_plan())
    started = time.process_time()
    plans = [plan, *(pickle.loads(message) for _ in range(writers - 1))]
    together, _ = planner.create_global_plan(plans)
    for part in together[1:]:
        pickle.dumps(part)
    spent = time.process_time() - started
    results = [pickle.dumps([WriteResult(item.index, 0, None) for item in part.items]) for part in together[1:]]
    return spent + timed(lambda: [pickle.loads(result) for result in results])


def planner_of(state: dict[str, Any], first: bool) -> DefaultSavePlanner:
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, None, first)
    return planner


def timed(action: Callable[[], Any]) -> float:
    started = time.process_time()
    action()
    return time.process_time() - started


if __name__ == "__main__":
    main()
