"""The inline assembly that sums over a warp: carried out here as the PTX manual defines it, beside plain sums.

Fragments of m16n8k16 in 16 bits and of m16n8k8 in TF32, with g = lane / 4 and t = lane % 4: a register of A has rows g
or g + 8, one of B has columns g, and D, of fp32, has rows g, g, g + 8, g + 8 and columns 2 t, 2 t + 1, 2 t, 2 t + 1.
"""

import re

import numpy as np
import torch
import triton
import triton.language as tl

from caduceus.ops.triton.scan_sums_kernels import WARP_SUM, selects_of_warp, sum_over_warp

LANE = np.arange(32)
G, T = LANE // 4, LANE % 4


@triton.jit
def sum_kernel(numbers_ptr, selects_ptr, sums_ptr):
    lane = tl.arange(0, 32)
    numbers = ()
    for i in tl.static_range(16):
        numbers = numbers + (tl.load(numbers_ptr + i * 32 + lane),)
    selects = selects_of_warp(32)
    for i in tl.static_range(5):
        tl.store(selects_ptr + i * 32 + lane, selects[i])
    first, second = sum_over_warp(selects, numbers, 32)
    tl.store(sums_ptr + lane, first)
    tl.store(sums_ptr + 32 + lane, second)


def multiply(shape: str, a: list[np.ndarray], b: list[np.ndarray]) -> list[np.ndarray]:
    """D of one mma, lane by lane."""
    if shape == "m16n8k16":
        A, B = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
        for register, (row, column) in zip(a, ((0, 0), (8, 0), (0, 8), (8, 8)), strict=True):
            A[G + row, 2 * T + column], A[G + row, 2 * T + 1 + column] = halves(register)
        for register, row in zip(b, (0, 8), strict=True):
            B[2 * T + row, G], B[2 * T + 1 + row, G] = halves(register)
    else:
        A, B = np.zeros((16, 8), np.float32), np.zeros((8, 8), np.float32)
        for register, (row, column) in zip(a, ((0, 0), (8, 0), (0, 4), (8, 4)), strict=True):
            A[G + row, T + column] = (register & 0xFFFFE000).view(np.float32)
        for register, row in zip(b, (0, 4), strict=True):
            B[T + row, G] = register.view(np.float32)
    D = A @ B
    return [D[G + row, 2 * T + i].view(np.uint32) for row in (0, 8) for i in (0, 1)]


def halves(register: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (register << 16).view(np.float32), (register & 0xFFFF0000).view(np.float32)


def rounded(number: np.ndarray) -> np.ndarray:
    return (number + 0x7FFF + (number >> 16 & 1)) & 0xFFFF0000


def carry_out(assembly: str, operands: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Registers after the assembly, 32 bits for each lane; `operands` by their $number."""
    known = dict(operands)

    def value(name: str) -> np.ndarray:
        name = name.removeprefix("0f") if name.startswith("0f") else name
        constant = re.fullmatch(r"(?:0x)?([0-9a-f]{8})|0", name)
        return np.full(32, int(constant[1] or "0", 16), np.uint32) if constant else known[name]

    for line in assembly.strip("{}\n ").split(";\n"):
        operation, _, rest = line.strip().rstrip(";").partition(" ")
        if operation == ".reg":
            continue
        groups = [re.split(r",\s*", g.strip("{}")) for g in re.findall(r"\{[^}]*\}|[^,\s{}]+", rest)]
        into, names = groups[0], [name for group in groups[1:] for name in group]
        if operation.startswith("mma"):
            assert all((value(name) == 0).all() for name in names[-4:])
            results = multiply(operation.split(".")[3], [value(n) for n in names[:4]], [value(n) for n in names[4:6]])
            known |= dict(zip(into, results, strict=True))
        elif operation == "cvt.rn.bf16x2.f32":
            known[into[0]] = rounded(value(names[0])) | rounded(value(names[1])) >> 16
        elif operation == "setp.ne.s32":
            known[into[0]] = value(names[0]) != value(names[1])
        elif operation == "selp.b32":
            known[into[0]] = np.where(known[names[2]], value(names[0]), value(names[1]))
        else:
            assert operation.startswith("mov."), operation
            known[into[0]] = value(names[0])
    return known


def test_the_assembly_sums_what_its_equivalent_sums(device):
    generator = torch.Generator(device).manual_seed(0)
    numbers = torch.randint(
        -64, 64, (16, 32), generator=generator, device=device
    ).float()  # all sums of which are exact
    selects = torch.zeros(5, 32, dtype=torch.int32, device=device)
    sums = torch.zeros(2, 32, device=device)
    sum_kernel[(1,)](numbers, selects, sums, num_warps=1)
    totals = numbers.sum(1).cpu().numpy()
    assert np.array_equal(sums.cpu().numpy(), np.stack([totals[G], totals[G + 8]]))
    operands = {f"${i + 2}": s for i, s in enumerate(selects.cpu().numpy().view(np.uint32))}
    operands |= {f"${i + 7}": n for i, n in enumerate(numbers.cpu().numpy().view(np.uint32))}
    found = carry_out(WARP_SUM.value, operands)
    assert np.array_equal(found["$0"].view(np.float32), totals[G])
    assert np.array_equal(found["$1"].view(np.float32), totals[G + 8])
