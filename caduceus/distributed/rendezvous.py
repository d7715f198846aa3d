"""How the processes of a run meet, and see before they compute together that they are of one run.

What they tell each other goes through the store at which they meet: processes that differ in their layout, or of which
some have no GPU, would wait for each other for ever in the first collective.
"""

import contextlib
import hashlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from caduceus.config import Config, config_to_dict
from caduceus.errors import Kind, NodeError, PeerError, UserError, of_rank, one_line
from caduceus.files import dump_json

MEETING = timedelta(minutes=15)
"""Ranks that are started together come within this."""


@dataclass(frozen=True)
class Member:
    """What a process tells of itself: `device` is "cpu" or "cuda", and `problem` why it cannot take part, if so."""

    host: str
    code: str
    configuration: str
    device: str | None
    problem: str | None = None

    @classmethod
    def here(cls, config: Config, device: str | None, problem: str | None = None) -> "Member":
        return cls(socket.gethostname(), *code_and_config_hash(config), device, problem)


def meet(member: Member, rank: int, world: int, timeout: timedelta) -> tuple[dist.Store, list[Member]]:
    """Wait for all ranks at MASTER_ADDR, MASTER_PORT; the store there, and what each rank tells of itself.

    Raises `PeerError` where they do not all come, and `UserError` without an address. `timeout`: of the store from
    then on.
    """
    if world == 1:  # which may have been started without any address to meet at
        return dist.HashStore(), [member]
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, world, timeout=MEETING))
        names = [f"member/{number}" for number in range(world)]
        store.set(names[rank], json.dumps(asdict(member)))
        store.wait(names, MEETING)
        members = [Member(**json.loads(text)) for text in store.multi_get(names)]
        done = [f"met/{number}" for number in range(world)]
        store.set(done[rank], "")
        if rank == 0:  # whose process may hold the store: it must not end before all have read
            store.wait(done, MEETING)
    except ValueError as error:  # there is no address
        raise UserError(f"rank {rank} on {member.host}: {one_line(error)}; start all ranks by torchrun") from None
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise PeerError(
            f"rank {rank} on {member.host}: not all {world} ranks met at {place} within {MEETING} "
            f"({str(error).splitlines()[0]}); see what the others say"
        ) from None
    store.set_timeout(timeout)
    return store, members


def refuse_strangers(members: list[Member], rank: int) -> None:
    """Raise on every rank if one is not of the run: other code, configuration or kind of device.

    The message names the first such rank and its host. That rank raises a `UserError`, or a `NodeError` where its node
    lacks the GPU that other nodes have, and the others a `PeerError`. Where code or configuration differ, either side
    may be the wrong one, so all raise a `PeerError`.
    """
    with_gpu = any(member.device == "cuda" for member in members)
    for number, member in enumerate(members):
        where = f"rank {number} on {member.host}"
        if difference := _difference(member, members[0]):
            raise PeerError(f"{where}: {difference}", number, Kind.USER)
        if with_gpu and member.device != "cuda":
            raise of_rank(
                NodeError(f"{where}: torch sees no GPU there, but other ranks have one; mend the node or leave it out"),
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
        with contextlib.suppress(OSError):  # which the layout's check tells
            settings.update(Path(config.parallel.deepspeed_config).read_bytes())
    return code.hexdigest(), settings.hexdigest()


def _difference(member: Member, first: Member) -> str | None:
    rows = [
        ("caduceus code", member.code, first.code, "install the same version"),
        ("configuration", member.configuration, first.configuration, "give the same file and overrides"),
    ]
    for name, here, there, remedy in rows:
        if here != there:
            return f"its {name} ({here[:12]}) is not that of {first.host} ({there[:12]}); {remedy} on all ranks"
    return None
