"""Launches the scan's kernels, with a method for each.

Shapes: P parameter directions, S streams, B batch, L length, E inner channels, N states.
"""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from caduceus.ops.operands import ScanOperands
from caduceus.ops.triton import scan_adjoint_kernels as adjoint_kernels
from caduceus.ops.triton import scan_backward_kernels as backward_kernels
from caduceus.ops.triton import scan_kernels as kernels
from caduceus.ops.triton import scan_pieces_kernels as pieces_kernels
from caduceus.ops.triton.device import LAUNCH, channel_block, device_of, in_pairs, places, wide_channel_block
from caduceus.ops.triton.scan_arithmetic import LOG2E

PIECE = 8
"""Number of tokens whose states the backward pass holds in registers at once."""
GROUP = 2
"""Number of states for which the backward pass sums the gradients of B and C over channels in one product."""
WARP_GROUP = 4
"""The same where the sums are computed within a warp."""
warp_sums = True
"""Whether to sum within a warp where possible; `caduceus.ops.self_check` sets it to False on a card that computes this
wrongly.
"""
WIDE_STATES = 16
"""With at most this many states, kernels that hold states in registers take two channels per thread, and UNROLL tokens
per turn of their loops where it divides the length. More states are enough work, and unrolled code takes long to
compile.
"""
WIDE_REGISTERS = 65_536 // (32 * 16)
"""Registers per thread with which 16 warps share a multiprocessor; without this limit two kernels would take more."""
MASKED_REGISTERS = 160
"""Registers of scan_backward where channels fill no whole block: at 168 the assembler of Triton 3.6 spills."""
UNROLL = 2
STATE_UNROLL = 4
"""The same of chunk_state where a token takes few registers: its turns have barriers."""
RESIDENT = 4
"""Programs that a multiprocessor has WIDE_REGISTERS for."""
STAGES = 2
"""Stages of loops without stores, in 16 bits with two channels per thread: they prefetch."""
REPLAY_BYTES = 2**31
"""Limit in bytes on the replayed states of the backward pass: longer scans are divided into segments, large enough to
fill a GPU.
"""


class Kept(NamedTuple):
    """What a forward pass keeps so that the backward pass need not replay chunks."""

    states: Tensor
    """(P, items, chunk / PIECE, N, E) fp32, before every PIECE-th token."""
    outputs: Tensor
    """(S, B, L, E) fp32, before the gate; empty where there is none."""


class ScanKernels:
    """The operands of a scan in the form that the kernels need, and a method for each kernel."""

    def __init__(
        self, operands: ScanOperands, starts: Tensor | None, softplus: bool, reverse: bool, chunk: int
    ) -> None:
        u, dt, A, B, C, D, z, dt_bias = operands
        self.P, self.S, self.batch, self.length, self.E = u.shape
        self.N = A.shape[-1]
        self.rows = self.P * self.S * self.batch
        self.chunk, self.n_chunks = chunk, triton.cdiv(self.length, chunk)
        self.items = self.S * self.batch * self.n_chunks
        self.reverse = int(reverse)
        self.given = operands
        self.u, self.dt = u.contiguous(), dt.contiguous()
        # Every thread reads all of B and C, two numbers per load.
        self.B, self.C = (in_pairs(t.float()) for t in (B, C))
        # States in front of channels: neighbouring threads read neighbouring addresses. exp2 wants the factor log2(e).
        self.A = (A.float() * LOG2E.value).transpose(-1, -2).contiguous()
        # Absent operands are never read, but the kernels need a pointer.
        self.z = self.u if z is None else z.contiguous()
        self.D, self.bias = (self.u if t is None else t.contiguous() for t in (D, dt_bias))
        self.starts = self.u if starts is None else starts.contiguous().view(torch.uint8)
        self.block = channel_block(u)
        self.blocks = triton.cdiv(self.E, self.block)
        options = {"E": self.E, "N": self.N, "SOFTPLUS": softplus, **LAUNCH}
        options |= {"HAS_BIAS": dt_bias is not None, "HAS_STARTS": starts is not None}
        self.options = {"BLOCK": self.block, **options}
        wide = wide_channel_block(u) if self.N <= WIDE_STATES else self.block
        self.wide_options = {"BLOCK": wide, "UNROLL": 1, **options}
        self.bounds = {}
        if self.N <= WIDE_STATES:
            self.wide_options["UNROLL"] = self._turn(UNROLL)
            self.bounds["maxnreg"] = WIDE_REGISTERS
        self.wide_blocks = triton.cdiv(self.E, wide)
        self.stages = STAGES if self.N <= WIDE_STATES else 1
        self.tile = {"N": self.N, "BLOCK": triton.next_power_of_2(self.N), "T": PIECE, **LAUNCH}
        self.has_D, self.has_z = D is not None, z is not None
        self._is_heavy = u.dtype == torch.float32 or starts is not None
        """Whether a token takes more registers than where most of it has 16 bits and sequences are not packed."""

    def _turn(self, most: int) -> int:
        """Tokens that a turn of a loop takes of all states."""
        return math.gcd(self.length, most) if self.N <= WIDE_STATES else 1

    def chunk_states(self) -> tuple[Tensor, Tensor]:
        """The final state of each chunk that begins with zero, and the sum of its dt."""
        states, sum_dt = self._per_chunk(self.N), self._per_chunk()
        with device_of(self.u):
            kernels.chunk_state_kernel[(self.rows * self.n_chunks, self.wide_blocks)](
                self.u,
                self.dt,
                self.A,
                self.B,
                self.bias,
                self.starts,
                states,
                sum_dt,
                *self._sizes(),
                STAGES=self.stages,
                **{**self.wide_options, "UNROLL": self._turn(UNROLL if self._is_heavy else STATE_UNROLL)},
            )
        return states, sum_dt

    def outputs(self, states: Tensor) -> Tensor:
        """y (S, B, L, E) from the states before every chunk."""
        out = self.u.new_empty(self.S, self.batch, self.length, self.E)
        with device_of(self.u):
            kernels.scan_forward_kernel[(self.items, self.wide_blocks)](
                *self._operands(),
                states,
                out,
                *self._sizes(),
                P=self.P,
                HAS_D=self.has_D,
                HAS_Z=self.has_z,
                **self.wide_options,
                **self.bounds,
            )
        return out

    def outputs_and_kept(self, states: Tensor) -> tuple[Tensor, Kept]:
        """y with the same bits, and the values that replaying would compute."""
        out = self.u.new_empty(self.S, self.batch, self.length, self.E)
        before_gate = self._fp32(*(out.shape if self.has_z else (0,)))
        kept = self._fp32(self.P, self.items, self.chunk // PIECE, self.N, self.E)
        with device_of(self.u):
            kernels.scan_keep_kernel[(self.items, self.wide_blocks)](
                *self._operands(),
                states,
                out,
                before_gate,
                kept,
                *self._sizes(),
                P=self.P,
                T=PIECE,
                HAS_D=self.has_D,
                HAS_Z=self.has_z,
                **{**self.wide_options, **self.bounds, "UNROLL": 1},  # registers do not suffice for two tokens
            )
        return out, Kept(kept, before_gate)

    def adjoints(self, dy: Tensor, before: Kept | None = None) -> tuple[Tensor, Tensor | None]:
        """Adjoint of each chunk's initial state by its own outputs; and dz, where these had a gate and are kept."""
        adjoints, dy, dz = self._per_chunk(self.N), dy.contiguous(), None
        kernel, given, found = adjoint_kernels.chunk_adjoint_kernel, (dy,), (adjoints,)
        options = {"HAS_Z": self.has_z}
        if before is not None and self.has_z:
            dz = self.z.new_empty(self.S * self.batch, self.length, self.E)
            kernel, given, found = adjoint_kernels.chunk_adjoint_dz_kernel, (dy, before.outputs), (adjoints, dz)
            options = {"P": self.P}
        with device_of(self.u):
            kernel[(self.rows * self.n_chunks, self.wide_blocks)](
                *(self.dt, self.A, self.C, self.z, self.bias, self.starts, *given, *found),
                *self._sizes(),
                STAGES=self.stages,
                **self.wide_options,
                **options,
            )
        return adjoints, dz

    def gradients(
        self, dy: Tensor, states: Tensor, adjoints: Tensor, before: Kept | None = None, dz: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Gradients of u, dt, A, B, C, D, z and dt_bias, from what comes into every chunk; uses `adjoints` up.

        `before`: what the forward pass kept, and `dz` what `adjoints` made of it. Without it chunks are replayed, as
        many at once as there is room for, which gives dz.
        """
        dy = dy.contiguous()
        segment = self._segment() if before is None else self.items
        if dz is None:
            dz = self.z.new_empty((self.S * self.batch, self.length, self.E) if self.has_z else 0)
        du, ddt = (t.new_empty(self.rows, self.length, self.E) for t in (self.u, self.dt))
        dA = self._fp32(self.P, self.N, self.E).zero_()
        dD, dbias = (self._fp32(self.P, self.E).zero_() for _ in range(2))
        dB, dC = (t.new_empty(self.rows, self.length, self.N) for t in (self.given[3], self.given[4]))
        for item in range(0, self.items, segment):
            count = min(segment, self.items - item)
            kept = pieces = dpieces = None  # two segments at a time would be twice the memory
            kept = self._replay(item, count, dy, states, dz) if before is None else before.states
            pieces = self._fp32(self.P, count, self.chunk // PIECE, self.N, 2 * PIECE)
            dpieces = self._fp32(self.blocks, *pieces.shape)
            sum_A, sum_D, sum_bias = (self._fp32(self.P, count, *shape, self.E) for shape in ((self.N,), (), ()))
            self._gather(item, count, pieces)
            self._reverse(item, count, dy, adjoints, kept, pieces, (du, ddt, sum_A.zero_(), dpieces, sum_D, sum_bias))
            self._scatter(item, count, dpieces, dB, dC)
            dA += sum_A.sum(1)
            dD += sum_D.sum(1)
            dbias += sum_bias.sum(1)
        found = (du, ddt, dA.transpose(-1, -2), dB, dC, dD, dz, dbias)
        return tuple(
            self.u.new_empty(0) if t is None else g.reshape(t.shape).to(t.dtype).contiguous()
            for t, g in zip(self.given, found, strict=True)
        )

    def _segment(self) -> int:
        """Chunks whose states are replayed at once: whole waves of programs, where there is room for one."""
        most = max(1, REPLAY_BYTES // (4 * self.P * (self.chunk // PIECE) * self.N * self.E))
        wave = max(1, places(RESIDENT, self.u.device) // self.wide_blocks)
        return most - most % wave if most >= wave else most

    def _replay(self, item: int, count: int, dy: Tensor, states: Tensor, dz: Tensor) -> Tensor:
        """Write dz. Returns the states before every PIECE-th token of chunks from number `item` on."""
        kept = self._fp32(self.P, count, self.chunk // PIECE, self.N, self.E)
        options = {**self.wide_options, **self.bounds}
        if self._is_heavy or self.E % options["BLOCK"]:  # registers do not suffice for two tokens
            options["UNROLL"] = 1
        with device_of(self.u):
            adjoint_kernels.scan_replay_kernel[(count, self.wide_blocks)](
                *self._operands(),
                dy,
                states,
                dz,
                kept,
                item,
                *self._sizes(),
                P=self.P,
                T=PIECE,
                HAS_D=self.has_D,
                HAS_Z=self.has_z,
                **options,
            )
        return kept

    def _gather(self, item: int, count: int, pieces: Tensor) -> None:
        with device_of(self.u):
            pieces_kernels.gather_pieces_kernel[(self.P * count, self.chunk // PIECE)](
                self.B,
                self.C,
                pieces,
                item,
                self.P,
                *self._sizes(),
                **self.tile,
            )

    def _scatter(self, item: int, count: int, dpieces: Tensor, dB: Tensor, dC: Tensor) -> None:
        with device_of(self.u):
            pieces_kernels.scatter_pieces_kernel[(self.P * count, self.chunk // PIECE)](
                dpieces, dB, dC, self.blocks, item, self.P, *self._sizes(), **self.tile
            )

    def _reverse(
        self, item: int, count: int, dy: Tensor, adjoints: Tensor, kept: Tensor, pieces: Tensor, sums: tuple
    ) -> None:
        in_warps = sums_in_warps(self.u.dtype, self.N) and self.block % 32 == 0
        group = WARP_GROUP if in_warps else math.gcd(self.N, GROUP)
        parts = self.length % PIECE > 0, self.E % self.block > 0
        limit = {(True, False): WIDE_REGISTERS, (False, True): MASKED_REGISTERS}.get(parts)
        limits = {"maxnreg": limit} if limit and in_warps and self.bounds and not self._is_heavy else {}
        with device_of(self.u):
            backward_kernels.scan_backward_kernel[(self.P * count, self.blocks)](
                self.u,
                self.dt,
                self.A,
                self.D,
                self.z,
                self.bias,
                self.starts,
                dy,
                adjoints,
                kept,
                pieces,
                *sums,
                item,
                *self._sizes(),
                P=self.P,
                T=PIECE,
                GROUP=group,
                LOG_COLUMNS=(2 * PIECE * group).bit_length() - 1,
                WHOLE=self.length % PIECE == 0,
                IN_FP32=self.u.dtype == torch.float32,
                IN_WARPS=in_warps,
                HAS_D=self.has_D,
                HAS_Z=self.has_z,
                **{**self.options, **limits},
            )

    def carry(self, states: Tensor, sum_dt: Tensor, first: Tensor | None, descending: bool) -> Tensor:
        """Replace each chunk's own state by the state that enters it, in place. Returns what leaves the last, (P, S, B,
        E, N).

        `first` (P, S, B, E, N): what enters the first chunk, by default zero. Adjoints are carried `descending`.
        """
        last = self._fp32(self.P, self.S, self.batch, self.N, self.E)
        has_first = first is not None
        if has_first:
            first = first.float().transpose(-1, -2).contiguous()
        block = 128
        with device_of(self.u):
            kernels.chunk_carry_kernel[(self.rows, triton.cdiv(self.N * self.E, block))](
                states,
                sum_dt,
                self.A,
                first if has_first else self.A,
                last,
                self.S,
                self.batch,
                self.n_chunks,
                self.reverse ^ int(descending),
                E=self.E,
                N=self.N,
                BLOCK=block,
                AHEAD=8,
                HAS_FIRST=has_first,
                **LAUNCH,
            )
        return last.transpose(-1, -2)

    def _operands(self) -> tuple[Tensor, ...]:
        return self.u, self.dt, self.A, self.B, self.C, self.D, self.z, self.bias, self.starts

    def _sizes(self) -> tuple[int, ...]:
        return self.S, self.batch, self.length, self.n_chunks, self.chunk, self.reverse

    def _per_chunk(self, *middle: int) -> Tensor:
        return self._fp32(self.rows, self.n_chunks, *middle, self.E)

    def _fp32(self, *shape: int) -> Tensor:
        return self.u.new_empty(*shape, dtype=torch.float32)


def sums_in_warps(dtype: torch.dtype, states: int) -> bool:
    """Whether the gradients of B and C are summed within a warp: where their terms may be rounded to bf16, as the sums
    are, and their number suits a warp. Else they are products in tiles.
    """
    return warp_sums and dtype == torch.bfloat16 and states % WARP_GROUP == 0
