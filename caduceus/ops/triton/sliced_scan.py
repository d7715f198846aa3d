"""The scan of one rank's slice of a sequence: the chunks' kernels, with an exchange between ranks in the middle."""

from torch import Tensor

from caduceus.ops.operands import ScanOperands
from caduceus.ops.triton.device import require_float
from caduceus.ops.triton.scan import chunk_length
from caduceus.ops.triton.scan_launches import ScanKernels


class SlicedScan:
    """`across_ranks.SlicedScan`.

    Ranks treat a state as chunks do, so both passes share the chunks' states.
    """

    def __init__(self, operands: ScanOperands, softplus: bool, reverse: bool) -> None:
        require_float(operands.u, "u")
        self._scan = ScanKernels(operands, None, softplus, reverse, chunk_length(operands.u))
        self._given = [t is not None for t in operands]

    def end_state(self) -> tuple[Tensor, Tensor]:
        self._states, self._sum_dt = self._scan.chunk_states()
        end = self._scan.carry(self._states.clone(), self._sum_dt, None, descending=False)
        return end, self._sum_dt.sum(1).view(end.shape[:-1])

    def outputs(self, initial_state: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        self._scan.carry(self._states, self._sum_dt, initial_state, descending=False)
        return self._scan.outputs(self._states), (self._states, self._sum_dt)

    def initial_gradient(self, dy: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        _, sum_dt = kept
        self._adjoints, _ = self._scan.adjoints(dy)
        return self._scan.carry(self._adjoints.clone(), sum_dt, None, descending=True)

    def gradients(self, dy: Tensor, final_gradient: Tensor, kept: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
        states, sum_dt = kept
        self._scan.carry(self._adjoints, sum_dt, final_gradient, descending=True)
        found = self._scan.gradients(dy, states, self._adjoints)
        return tuple(g if given else None for g, given in zip(found, self._given, strict=True))
