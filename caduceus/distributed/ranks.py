"""The ranks of a run: how they are arranged, and how they agree.

World = data-parallel ranks x strands x context. Ranks with slices of the same strand (`parallel.context`) are
neighbours, as they exchange states in every layer. Next to them are the ranks with the other strand
(`parallel.strands`), with which they exchange logits once per micro-batch; so all ranks of a sample are on one node.
Ranks that share parameters (`parallel.shard`) are neighbours too. Gradients are summed over the whole world, so any
neighbours will do.
"""

import os
import socket
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from caduceus.devices import GPU
from caduceus.distributed.context import ContextGroup
from caduceus.distributed.groups import gather, group_of, on_device
from caduceus.distributed.strands import StrandGroup
from caduceus.errors import Kind, PeerError, UserError, kind_of, one_line

_WEIGHTS = [Kind.PEER, Kind.RETRY, Kind.CRASH, Kind.NODE, Kind.USER]
"""Where several ranks fail at once, all end with the failure whose kind comes last here."""
PATIENCE = timedelta(hours=2)
"""Time that ranks wait for one that opens data or writes a checkpoint, which a slow file system may delay."""
_NO_MORE = object()

T = TypeVar("T")


class Ranks:
    """This process among the processes of the run.

    rank, world: the number of this process, and of all processes. data_rank, data_world: decide which samples it draws.
    context_rank, context: decide its slice of a sample. strand_rank, strands: decide its strand; with `strands` 1 it
    computes all of the model's. device: where this process computes. timeout: how long collectives in groups of some
    ranks may take.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        context: int,
        device: torch.device,
        timeout: timedelta | None = None,
        strands: int = 1,
    ) -> None:
        self.rank = rank
        self.world = world
        self.context = context
        self.strands = strands
        self.context_rank = rank % context
        self.strand_rank = rank // context % strands
        self.data_rank = rank // (context * strands)
        self.data_world = world // (context * strands)
        self.device = device
        self.timeout = timeout
        self.context_group = self._make_context_group()
        self.strand_group = self._make_strand_group()
        self._sample_group = self._make_sample_group()
        self._patient_group = dist.new_group(backend="gloo", timeout=PATIENCE) if world > 1 else None
        self._agrees_over: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files that only one rank writes."""
        return self.rank == 0

    def positions(self, seq_len: int) -> tuple[int, int]:
        """The slice (first, end) of every sequence that this rank computes."""
        width = seq_len // self.context
        return self.context_rank * width, (self.context_rank + 1) * width

    def mirrored(self, tensor: torch.Tensor) -> torch.Tensor:
        """(B, L, …) for this rank's slices of sequences -> the same for the sequences read backwards."""
        if self.context_group is None:
            return tensor.flip(1)
        return self.context_group.all_gather(tensor)[self.context - 1 - self.context_rank].flip(1)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def maximum(self, value: int) -> int:
        """The largest value of all ranks. With this they agree to stop, save or skip."""
        if self.world == 1:
            return value
        tensor = torch.tensor(value, device=self._agrees_on)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._agrees_over)
        return int(tensor)

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """A context in which idle ranks wait up to `PATIENCE` for the others, and without using the GPU.

        It is for work that depends on files. Work that ranks compute together has the shorter limit of training's
        collectives.
        """
        before, self._agrees_over = self._agrees_over, self._patient_group
        try:
            yield
        finally:
            self._agrees_over = before

    @property
    def _agrees_on(self) -> torch.device:
        """The device on which numbers to agree on must be."""
        return self.device if self._agrees_over is None else torch.device("cpu")

    @property
    def shares_samples(self) -> bool:
        """Whether other ranks, its peers, compute other slices or strands of this rank's samples."""
        return self._sample_group is not None

    def largest_of_peers(self, values: torch.Tensor) -> torch.Tensor:
        """Elementwise maximum over this rank and its peers, in place; for tensors on the CPU the GPU is not used."""
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._sample_group)
        return values

    def gather(self, numbers: list[float] | torch.Tensor) -> torch.Tensor:
        """Numbers (n,) of each rank -> (world, n) float64 on the CPU, the same on all ranks."""
        if self.world == 1:  # no GPU is needed
            return torch.as_tensor(numbers, dtype=torch.float64).cpu()[None]
        mine = torch.as_tensor(numbers, dtype=torch.float64, device=self._agrees_on)
        return gather(mine, self._agrees_over).cpu()

    def gather_objects(self, value: object) -> list[object]:
        """Each rank's picklable value, on every rank."""
        if self.world == 1:
            return [value]
        values: list[object] = [None] * self.world
        dist.all_gather_object(values, value, group=self._agrees_over)
        return values

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier(group=self._agrees_over)

    def broadcast(self, value: T, source: int = 0) -> T:
        """The picklable value of the rank `source`, on every rank."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=source, device=self._agrees_on, group=self._agrees_over)
        return values[0]

    def raise_together(self, error: BaseException | None) -> None:
        """Raise on every rank if any has an error, as the others must not wait for a rank that is gone.

        A rank raises its own error. A rank without one, or with only a peer's, raises a `PeerError` that says which
        rank failed, how and why.
        """
        self.raise_for(self.maximum(self.weight_of(error)), error)

    def raise_for(self, heaviest: int, error: BaseException | None) -> None:
        """Raise where the largest `weight_of` of all ranks belongs to an error, on behalf of the first rank
        that has it.
        """
        if heaviest == 0:
            return
        culprit = self.world - 1 - (heaviest - 1) % self.world
        told = self.broadcast((socket.gethostname(), error and one_line(error), error and kind_of(error)), culprit)
        if error is not None and (culprit == self.rank or kind_of(error) is not Kind.PEER):
            raise error
        host, message, kind = told
        raise PeerError(f"rank {culprit} on {host} failed: {message}", culprit, kind) from error

    def weight_of(self, error: BaseException | None) -> int:
        """A number that orders errors by kind, then by rank; 0 without an error."""
        if error is None:
            return 0
        return 1 + _WEIGHTS.index(kind_of(error)) * self.world + self.world - 1 - self.rank

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """A context for work that each rank does alone; where it fails on one, all raise at the end of the block."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        self.raise_together(failure)

    def together(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; every rank makes the same number. Where making one fails on a rank, all raise."""
        iterator = iter(items)
        while True:
            with self.agreeing():
                item = next(iterator, _NO_MORE)
            if item is _NO_MORE:
                return
            yield item

    def groups(self) -> dict[str, tuple[dist.ProcessGroup | None, torch.device]]:
        """The groups of this rank, each with what its ranks share and its device; None means all ranks."""
        found: dict[str, tuple[dist.ProcessGroup | None, torch.device]] = {}
        if self.world > 1:
            found["all ranks"] = None, self.device
            found["all ranks, for slow work,"] = self._patient_group, torch.device("cpu")
        if self.context_group is not None:
            found["the ranks that share its strand"] = self.context_group.group, self.device
        if self.strand_group is not None:
            found["the ranks that share its slice"] = self.strand_group.group, self.device
        if self._sample_group is not None:
            found["the ranks that share its samples"] = self._sample_group, torch.device("cpu")
        return found

    def _make_context_group(self) -> ContextGroup | None:
        if self.context == 1:
            return None
        first = self.rank - self.context_rank
        members = list(range(first, first + self.context))
        return ContextGroup(group_of(members, self.timeout, on_device(self.device)), self.context_rank, self.context)

    def _make_strand_group(self) -> StrandGroup | None:
        if self.strands == 1:
            return None
        first = self.rank - self.strand_rank * self.context
        members = list(range(first, first + self.strands * self.context, self.context))
        return StrandGroup(group_of(members, self.timeout, on_device(self.device)), self.strand_rank, self.strands)

    def _make_sample_group(self) -> dist.ProcessGroup | None:
        shared = self.strands * self.context
        if shared == 1:
            return None
        first = self.data_rank * shared
        return group_of(list(range(first, first + shared)), self.timeout, "gloo")


def is_lost_contact(error: BaseException) -> bool:
    """Whether torch.distributed itself raised the error, which it does where a peer is gone."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    while modules and modules[-1] == "torch._ops":  # functional collectives are called through this
        modules.pop()
    raised_in = modules[-1] if modules else ""
    plain = type(error) is RuntimeError or isinstance(error, dist.DistError)
    return plain and raised_in.startswith(("torch.distributed.", "torch.nn.parallel.distributed"))


def make_deterministic(deterministic: bool) -> None:
    """Let torch's operators and cuBLAS give the same bits every time, or be as fast as possible."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # Filling memory that will be overwritten only serves to find faulty operators.
    torch.utils.deterministic.fill_uninitialized_memory = False


def choose_device(name: str) -> torch.device:
    """The device of `run.device`; where several GPUs are visible, the one of this local rank. Raises `UserError`
    without a GPU.
    """
    if name == "auto":
        name = GPU if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("run.device: cuda was asked for, but torch sees no GPU here; use run.device=cpu")
    return torch.device(GPU, int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
