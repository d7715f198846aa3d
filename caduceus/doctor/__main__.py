"""python -m caduceus.doctor [--folder DIR] [--device auto|cpu|cuda]

Examines this machine, or under torchrun all machines of the ranks, and prints one page: what is wrong, what should be
looked at, and what to do. `launch/slurm.py --check --nodes 2` does it on the nodes of a cluster.
"""

import argparse
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from caduceus.arguments import Parser
from caduceus.devices import DEVICES, is_gpu
from caduceus.distributed.environment import allow_descriptors, choose_interface
from caduceus.distributed.groups import of_all_ranks
from caduceus.distributed.ranks import Ranks, choose_device
from caduceus.doctor import collectives, node
from caduceus.doctor.device import kernels
from caduceus.doctor.findings import Finding, State, node_name, ok_unless, page
from caduceus.errors import NodeError, one_line, run_command

MEETING = timedelta(minutes=2)
MAX_CLOCK_SKEW = 5.0
"""Seconds by which clocks may differ before times in logs mislead."""


def main() -> int:
    """Examine everything; the first rank prints the page. Returns the exit status: 1 where something is
    wrong, else 0.
    """
    parser = Parser(
        prog="python -m caduceus.doctor", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs are kept (runs)")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    arguments = parser.parse_args()
    return examine(arguments.folder, arguments.device)


def examine(folder: Path, device_name: str) -> int:
    """Do what the command does; the environment (RANK, WORLD_SIZE) tells the ranks."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device_name)
    first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0
    found = list(node.findings(world, folder)) if first_here else []
    found.append(kernels(device))
    if world == 1:
        by_rank = [(node_name(), found)]
    else:
        _join(device, rank, world)
        by_rank = _together(Ranks(rank, world, 1, device, MEETING), found)
        dist.destroy_process_group()
    if rank == 0:
        print(page(by_rank), flush=True)
    return int(any(finding.state is State.WRONG for _, findings in by_rank for finding in findings))


def _join(device: torch.device, rank: int, world: int) -> None:
    allow_descriptors(world)
    choose_interface(world)
    on_gpu = is_gpu(device)
    if on_gpu:
        torch.cuda.set_device(device)
    try:
        dist.init_process_group(
            of_all_ranks(device), timeout=MEETING, rank=rank, world_size=world, device_id=device if on_gpu else None
        )
    except (dist.DistError, RuntimeError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise NodeError(
            f"rank {rank} on {node_name()}: the {world} ranks do not meet at {place} ({one_line(error)[:200]}); check "
            "that all nodes reach this address, and that its port is open"
        ) from None


def _together(ranks: Ranks, found: list[Finding]) -> list[tuple[str, list[Finding]]]:
    """The findings of every rank; those that ranks can only make together are added to the first rank's."""
    clocks = ranks.gather_objects((node_name(), time.time()))
    nodes = [name for name, _ in clocks]
    by_rank = list(zip(nodes, ranks.gather_objects(found), strict=True))
    skew = max(moment for _, moment in clocks) - min(moment for _, moment in clocks)
    told = f"within {skew:.1f} s of one another"
    everywhere = [ok_unless(skew > MAX_CLOCK_SKEW, "clocks", told, "set the clocks (NTP)")]
    everywhere += collectives.rates(ranks, nodes)
    return [(name, findings + everywhere) for name, findings in by_rank]


def command() -> None:
    """The command line."""
    run_command(main)


if __name__ == "__main__":
    command()
