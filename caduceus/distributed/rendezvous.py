"""Connects the processes of a run, and checks before they compute together that they belong to the same run: `joined`.

They exchange these facts through the store at which they meet: processes with different layouts, or of which some have
no GPU, would wait for each other without end in the first collective.
"""

import contextlib
import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from caduceus.config import Config, config_to_dict
from caduceus.devices import GPU, is_gpu
from caduceus.distributed.deepspeed.package import need_deepspeed
from caduceus.distributed.environment import allow_descriptors, choose_interface, set_nccl_defaults, stay_near
from caduceus.distributed.groups import of_all_ranks
from caduceus.distributed.layout import Room, check_layout
from caduceus.distributed.ranks import Ranks, choose_device, is_lost_contact, make_deterministic
from caduceus.errors import Kind, NodeError, PeerError, UserError, of_rank, one_line
from caduceus.files import dump_json
from caduceus.run.directory import RunDirectory
from caduceus.run.leaving import among_peers

MEETING = timedelta(minutes=15)
"""Time within which ranks that are started together must meet."""
COLLECTIVE_MARGIN = timedelta(minutes=10)
"""A collective that exceeds the limit of a step by this has lost a rank; the watchdog of steps acts earlier."""
NO_TIMEOUT = timedelta(days=365)
"""Timeout of collectives where steps have no limit, as the libraries always need one."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """The facts that a process reports about itself. `device`: its type. `problem`: why it cannot take part, or
    None.
    """

    host: str
    code: str
    configuration: str
    device: str | None
    problem: str | None = None
    memory: int | None = None
    """Bytes of its GPU's memory."""

    @classmethod
    def here(cls, config: Config, device: torch.device | None, problem: str | None = None) -> "Member":
        kind, memory = device and device.type, None
        if kind == GPU:
            memory = torch.cuda.get_device_properties(device).total_memory
        return cls(socket.gethostname(), *code_and_config_hash(config), kind, problem, memory)


def meet(member: Member, rank: int, world: int, timeout: timedelta) -> tuple[dist.Store, list[Member]]:
    """Wait for all ranks at MASTER_ADDR, MASTER_PORT. Returns the store there, and the facts of each rank.

    Raises `PeerError` where they do not all come, and `UserError` without an address. `timeout`: that of the store
    afterwards.
    """
    if world == 1:  # the process may have been started without an address
        return dist.HashStore(), [member]
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=MEETING))
        names = [f"member/{number}" for number in range(world)]
        store.set(names[rank], json.dumps(asdict(member)))
        store.wait(names, MEETING)
        members = [Member(**json.loads(text)) for text in store.multi_get(names)]
        done = [f"met/{number}" for number in range(world)]
        store.set(done[rank], "")
        if rank == 0:  # this process may hold the store: it must not end before all have read
            store.wait(done, MEETING)
    except ValueError as error:  # there is no address
        raise UserError(f"rank {rank} on {member.host}: {one_line(error)}; start all ranks with torchrun") from None
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise PeerError(
            f"rank {rank} on {member.host}: not all {world} ranks met at {place} within {MEETING} "
            f"({str(error).splitlines()[0]}); see the messages of the others"
        ) from None
    store.set_timeout(timeout)
    return store, members


def refuse_strangers(members: list[Member], rank: int) -> None:
    """Raise on every rank if one has other code, another configuration or another kind of device.

    The message names the first such rank and its host. That rank raises a `UserError`, or a `NodeError` where its node
    lacks a GPU that other nodes have; the others raise a `PeerError`. Where code or configuration differ, either side
    may be the wrong one, so all raise a `PeerError`.
    """
    with_gpu = any(member.device == GPU for member in members)
    for number, member in enumerate(members):
        where = f"rank {number} on {member.host}"
        if difference := _difference(member, members[0]):
            raise PeerError(f"{where}: {difference}", number, Kind.USER)
        if with_gpu and member.device != GPU:
            raise of_rank(
                NodeError(
                    f"{where}: torch sees no GPU there, but other ranks have one; repair the node or leave it out"
                ),
                number,
                rank,
            )
        if member.problem:
            everywhere = all(other.problem == member.problem for other in members)
            if everywhere:
                raise UserError(member.problem)
            raise of_rank(UserError(f"{where}: {member.problem}"), number, rank)


def code_and_config_hash(config: Config) -> tuple[str, str]:
    """sha256 of the package's sources, and of the resolved configuration with DeepSpeed's file."""
    code = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        code.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    settings = hashlib.sha256(dump_json(config_to_dict(config)))
    if config.parallel.deepspeed_config is not None:
        with contextlib.suppress(OSError):  # the check of the layout reports it
            settings.update(Path(config.parallel.deepspeed_config).read_bytes())
    return code.hexdigest(), settings.hexdigest()


def _difference(member: Member, first: Member) -> str | None:
    rows = [
        ("caduceus code", member.code, first.code, "install the same version"),
        ("configuration", member.configuration, first.configuration, "give the same file and overrides"),
    ]
    for name, here, there, remedy in rows:
        if here != there:
            return f"its {name} ({here[:12]}) differs from that of {first.host} ({there[:12]}); {remedy} on all ranks"
    return None


@contextlib.contextmanager
def joined(config: Config) -> Iterator[Ranks]:
    """A context with the ranks that torchrun or the launcher started (RANK, WORLD_SIZE, LOCAL_RANK), or this process
    alone.

    Raises `UserError` on every rank where they do not belong to one run, or cannot be arranged as `parallel.*` asks.
    Where the process has already joined a group, that group is used and left as it is.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    make_deterministic(config.train.deterministic)
    if world == 1 and config.parallel.strategy in ("auto", "single"):
        check_layout(config, world)
        yield Ranks(0, 1, 1, choose_device(config.run.device))
        return
    timeout = _collective_timeout(config.train.stall_minutes)
    device, problem = None, None
    try:
        device = choose_device(config.run.device)
        check_layout(config, world)
        if config.parallel.strategy == "deepspeed":
            need_deepspeed(device.type)
    except UserError as error:
        problem = str(error)
    member = Member.here(config, device, problem)
    joined_already = dist.is_initialized()
    if joined_already:
        members: list[Member | None] = [None] * world
        dist.all_gather_object(members, member)
    else:
        store, members = meet(member, rank, world, timeout)
    refuse_strangers(members, rank)
    sharing = check_layout(config, world, _room(members))
    if rank == 0 and (sharing.strands, sharing.context) != (config.parallel.strands or 1, config.parallel.context or 1):
        why = "so that a global batch of %d sequences gives each of %d ranks a part, and little has to be recomputed"
        _log.info(f"%s: chosen, {why}", sharing, config.train.global_batch, world)
    arranged = world, sharing.context, device, timeout, sharing.strands
    if joined_already:
        with _telling_lost_contact(rank):
            yield Ranks(rank, *arranged)
        return
    with among_peers() if world > 1 else _destroying_group():
        _start_collectives(config, device, store, rank, world, timeout)
        with _telling_lost_contact(rank):
            yield Ranks(rank, *arranged)
    if world > 1:  # after a failure it stays, as NCCL destroys it on all ranks together
        dist.destroy_process_group()


def _room(members: list[Member]) -> Room | None:
    """The smallest resources of all ranks; None where they compute on CPUs."""
    memory = [member.memory for member in members if member.memory is not None]
    node = int(os.environ.get("LOCAL_WORLD_SIZE", len(members)))
    return Room(min(memory), node) if memory else None


@contextlib.contextmanager
def _destroying_group() -> Iterator[None]:
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _telling_lost_contact(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not is_lost_contact(error):
            raise
        _log.warning("a collective failed on rank %d", rank, exc_info=error)
        host = socket.gethostname()
        raise PeerError(f"rank {rank} on {host}: lost contact with another rank ({one_line(error)})") from error


def _start_collectives(
    config: Config, device: torch.device, store: dist.Store, rank: int, world: int, timeout: timedelta
) -> None:
    on_gpu = is_gpu(device)
    if on_gpu:
        torch.cuda.set_device(device)
        set_nccl_defaults(RunDirectory(config.run.dir).logs_path)
        _look_at_gpu(device, rank)
    allow_descriptors(world)
    choose_interface(world)
    dist.init_process_group(
        of_all_ranks(device),
        timeout=timeout,
        store=store,
        rank=rank,
        world_size=world,
        device_id=device if on_gpu else None,
    )


def _look_at_gpu(device: torch.device, rank: int) -> None:
    """Pin the process near its GPU, and warn where ranks cannot reach each other's GPUs."""
    facts = torch.cuda.get_device_properties(device)
    stay_near(f"{facts.pci_domain_id:04x}:{facts.pci_bus_id:02x}:{facts.pci_device_id:02x}.0")
    local_ranks, seen = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if rank == 0 and seen < local_ranks and "MIG" not in facts.name:
        _log.warning(
            "each rank sees %d of the GPUs of its node, which has %d ranks: NCCL may then not copy directly between "
            "GPUs; let every rank see all of them (SLURM: --gpus-per-node, not --gpus-per-task)",
            *(seen, local_ranks),
        )


def _collective_timeout(stall_minutes: float) -> timedelta:
    if not 0 < stall_minutes < NO_TIMEOUT / timedelta(minutes=1):
        return NO_TIMEOUT
    return timedelta(minutes=stall_minutes) + COLLECTIVE_MARGIN
