"""Checks before the first step, so that a faulty node is reported in one line now, instead of hanging hours later."""

import os
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from caduceus.config import Config
from caduceus.data.loader import TrainLoader
from caduceus.devices import is_gpu
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strategy import Strategy
from caduceus.errors import Kind, NodeError, PeerError, UserError, of_rank
from caduceus.files import show_bytes
from caduceus.model.costs import checkpoint_bytes
from caduceus.ops.backends import check_backend
from caduceus.patience import is_directory
from caduceus.run.directory import RunDirectory
from caduceus.train import memory
from caduceus.train.recomputation import run_micro_batch, too_large

MAX_CLOCK_SKEW = 60.0
"""Largest difference of clocks, in seconds. With more, times in logs, file times and time limits mislead."""
_BATCHES_AHEAD = 2
"""Batches that torch's DataLoader keeps ready per worker."""
_BYTES_PER_BASE = 8
"""Bytes that a base takes on its way from a worker: token, label and weight, rounded up."""
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class RankFacts:
    """What a rank finds out about itself. `disk` and `shared_memory`: what is wrong with them, or None."""

    host: str
    clock: float
    disk: str | None
    shared_memory: str | None


def check_model(config: Config, device: torch.device) -> None:
    """Raise `UserError` where `ops.backend` cannot run the model here. It runs before shards are opened."""
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    check_backend(config.ops.backend, device, dtype, config.model)


def refuse_other_data(loader: TrainLoader, ranks: Ranks) -> None:
    """Raise `PeerError` on every rank where `data.path` holds other data on one rank than on the first."""
    (first_host, first), *_ = found = ranks.gather_objects((socket.gethostname(), loader.fingerprint))
    for rank, (host, fingerprint) in enumerate(found):
        if fingerprint != first:  # either rank may have the wrong ones
            raise PeerError(
                f"rank {rank} on {host}: data.path leads to other shards ({fingerprint[:12]}) than on {first_host} "
                f"({first[:12]}); give all ranks the same",
                rank,
                Kind.USER,
            )


def check_before_start(
    config: Config, run: RunDirectory, strategy: Strategy, saving: dist.ProcessGroup | None = None
) -> None:
    """Check disk, shared memory, clocks and collectives, on all ranks together.

    `saving`: the group of the ranks that write a checkpoint. After a failure it raises on every rank, with a line that
    names the first rank that failed, its host and what to do: on that rank a `UserError`, or a `NodeError` where its
    node is at fault, and on the others a `PeerError`.
    """
    ranks = strategy.ranks
    with ranks.agreeing(), run.telling_of_disks():
        facts = RankFacts(
            host=socket.gethostname(),
            clock=time.time(),
            disk=_disk_problem(run.path, checkpoint_bytes(config.model, config.train)),
            shared_memory=_shared_memory_problem(config, ranks),
        )
    found = ranks.gather_objects(facts)
    for rank, facts in enumerate(found):
        where = f"rank {rank} on {facts.host}"
        if problem := facts.shared_memory or _clock_problem(facts, found[0]):
            raise of_rank(NodeError(f"{where}: {problem}"), rank, ranks.rank)
        if facts.disk:
            raise of_rank(UserError(f"{where}: {facts.disk}"), rank, ranks.rank)
    _try_collectives(strategy, saving)


def _disk_problem(directory: Path, needed: int) -> str | None:
    free = shutil.disk_usage(directory).free
    if free >= needed:
        return None
    return (
        f"{directory}: {show_bytes(free)} free, but a checkpoint takes {show_bytes(needed)}; make room or move run.dir"
    )


def _shared_memory_problem(config: Config, ranks: Ranks) -> str | None:
    if not config.data.workers or not is_directory(_SHARED_MEMORY):
        return None
    batch = config.train.micro_batch * config.data.seq_len // ranks.context * _BYTES_PER_BASE
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    needed = local_ranks * config.data.workers * _BATCHES_AHEAD * batch
    free = shutil.disk_usage(_SHARED_MEMORY).free
    if free >= needed:
        return None
    return (
        f"{_SHARED_MEMORY}: {show_bytes(free)} free, but loader workers need {show_bytes(needed)}; enlarge it "
        "(docker: --shm-size) or lower data.workers"
    )


def _clock_problem(facts: RankFacts, first: RankFacts) -> str | None:
    skew = facts.clock - first.clock
    if abs(skew) <= MAX_CLOCK_SKEW:
        return None
    return f"its clock differs by {skew:+.0f} s from that of {first.host}; set the clocks (NTP)"


def _try_collectives(strategy: Strategy, saving: dist.ProcessGroup | None) -> None:
    """Try one all-reduce in every group of ranks that training uses. Raises `NodeError` where it gives a wrong sum."""
    ranks = strategy.ranks
    groups = ranks.groups()
    for mesh in {parameter.device_mesh for parameter in strategy.model.parameters() if isinstance(parameter, DTensor)}:
        for name in mesh.mesh_dim_names:
            groups[f"the ranks that {name} parameters"] = mesh.get_group(name), ranks.device
    if saving is not None:
        groups["the ranks that write checkpoints"] = saving, torch.device("cpu")
    for name, (group, device) in groups.items():
        size = dist.get_world_size(group)
        ones = torch.ones(1, device=device)
        dist.all_reduce(ones, group=group)
        if ones.item() != size:
            raise PeerError(
                f"rank {ranks.rank} on {socket.gethostname()}: a sum over {name} is {ones.item():g} instead of {size}; "
                "the network or its drivers are broken"
            )


def check_gpu_memory(config: Config, strategy: Strategy) -> None:
    """Run a micro-batch on the GPU, to check that memory suffices for it and the optimizer. On a CPU it does
    nothing.
    """
    ranks = strategy.ranks
    if not is_gpu(ranks.device):
        return
    run_micro_batch(config, strategy)
    peak = torch.cuda.max_memory_allocated(ranks.device) + memory.moment_bytes_to_come(config, strategy)
    # This is not all memory of the GPU: the driver, NCCL and other processes have taken some.
    available = memory.free_memory(ranks.device) + torch.cuda.memory_allocated(ranks.device)
    with ranks.agreeing():
        if peak > available:
            taken = f"a micro-batch and the optimizer take {show_bytes(peak)} of the {show_bytes(available)}"
            raise too_large(config, ranks, f"{taken} of its GPU that it can have")
    torch.cuda.reset_peak_memory_stats(ranks.device)
