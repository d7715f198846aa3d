"""Compares a request with the partitions of this machine's SLURM, before a job waits in a queue."""

import math

from launch import scheduler
from launch.request import JobRequest, parse_time
from launch.scheduler import Nodes

_MEGABYTES = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}


def slurm_complaint(request: JobRequest) -> str | None:
    """What this machine's SLURM would refuse in the request, in one line; None where no mistake is seen.

    Nodes that are down or drained count as available: sbatch queues a job until they are back.
    """
    if not scheduler.is_here("sbatch"):
        return "there is no SLURM on this machine (sbatch not found); to run here use --cluster local"
    try:
        nodes = scheduler.nodes()
    except scheduler.SilentError as error:
        return f"{error}; to run on this machine use --cluster local"
    names = sorted({row.partition for row in nodes})
    if request.partition is not None:
        for wanted in request.partition.split(","):
            if wanted not in names:
                return f"partition: there is no partition '{wanted}' here; choose one of {', '.join(names)}"
    chosen = _chosen(request, nodes)
    most = max((row.gpus(request.gpu_type) for row in (chosen if request.partition else nodes)), default=0)
    if request.gpus_per_node > most and request.gpu_request != "none":
        kind = f"{request.gpu_type} GPUs" if request.gpu_type else "GPUs"
        return f"gpus_per_node: {request.gpus_per_node} {kind} asked for, but a node has at most {most}"
    if chosen and request.allocated_nodes > (most := _largest_partition(chosen)):
        spare = f" and {request.spare} spare" if request.spare else ""
        return f"nodes: {request.nodes}{spare} asked for, but a partition has at most {most}"
    limits = [(_limit(row.limit), row.limit) for row in chosen]
    # A quality of service may override the partition's limit.
    if limits and request.qos is None and request.minutes > max(limits)[0]:
        asked = "no limit" if math.isinf(request.minutes) else request.time
        return f"time: {asked} asked for, but the partition's limit is {max(limits)[1]}"
    return None


def waiting_note(request: JobRequest) -> str | None:
    """A note that a request will wait for nodes which take no job now; None where these do not help, or are not needed.

    Raises `SilentError` where SLURM does not answer.
    """
    suitable = [row for row in _chosen(request, scheduler.nodes()) if _has_room(row, request)]
    if _largest_partition([row for row in suitable if row.can_start]) >= request.allocated_nodes:
        return None
    if _largest_partition(suitable) < request.allocated_nodes:
        return None
    states = sorted(
        {row.state if row.is_up else "in a partition that is down" for row in suitable if not row.can_start}
    )
    return f"the job will wait, as nodes that it needs are {', '.join(states)} now"


def _chosen(request: JobRequest, nodes: list[Nodes]) -> list[Nodes]:
    """The nodes of the partitions that the job may run in."""
    if request.partition is None:
        return [row for row in nodes if row.is_default]
    return [row for row in nodes if row.partition in request.partition.split(",")]


def _largest_partition(nodes: list[Nodes]) -> int:
    counts: dict[str, int] = {}
    for row in nodes:
        counts[row.partition] = counts.get(row.partition, 0) + row.count
    return max(counts.values(), default=0)


def _has_room(row: Nodes, request: JobRequest) -> bool:
    """Whether an empty node of this row could hold its share of the job."""
    cpus = request.processes_per_node * (request.cpus_per_task or 1)
    gpus = request.gpus_per_node if request.gpu_request != "none" else 0
    return row.cpus >= cpus and row.memory >= _memory(request.mem) and row.gpus(request.gpu_type) >= gpus


def _memory(text: str | None) -> float:
    """MB in sbatch's forms of memory: 200G, 4096 (MB). Text that cannot be read counts as 0 and is left to sbatch."""
    digits = (text or "0").upper().removesuffix("B")
    unit = _MEGABYTES.get(digits[-1:], 1)
    digits = digits.rstrip("KMGT")
    return float(digits) * unit if digits.isdigit() else 0


def _limit(text: str) -> float:
    """Minutes of a partition's limit as sinfo prints it."""
    return parse_time(text) if text[:1].isdigit() else math.inf
