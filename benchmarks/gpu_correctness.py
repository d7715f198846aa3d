"""Checks that the Triton kernels are right on this machine's GPU; exits with status 1 if they are not.

    python benchmarks/gpu_correctness.py [--only ops golden bits far] [--device cuda]

ops: every op with all gradients against its definition in fp64, in three types, over odd shapes, packed, padded,
reversed, sliced, with and without what is optional; and the same bits twice. golden: the golden files, which are
outputs and gradients of the published implementation, in fp32 and under bf16 autocast. bits: a whole training step and
the scan twice at the published size. far: tensors of more than 2^31 elements, whose offsets do not fit in 32 bits. It
needs the repository, for its golden files. `--device cpu` runs all but `far` in Triton's interpreter, at toy sizes.
"""

import datetime
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import patch

import torch
from gpu import CommandLine, device_name, give_memory_back
from torch import Tensor

from caduceus.alphabet import IGNORE_LABEL
from caduceus.config import CaduceusConfig
from caduceus.model.heads import CaduceusForMaskedLM
from caduceus.ops.operands import ScanOperands
from caduceus.ops.triton import scan_launches

sys.path.append(str(Path(__file__).parents[1]))  # the tests are not installed
from gpu_ops import Case, every_case, scan_inputs, scan_operands

from caduceus.ops.self_check import ACTIVATIONS, BOUNDS, differentiate, error_of
from tests.model.golden import NAMES, load_golden, relative_error

OPS = {**BOUNDS, torch.float16: 2e-3}
"""Most error of an output or gradient; fp16 is rounded by 2^-11 where bf16 is by 2^-8."""
GOLDEN = {torch.float32: (5e-6, 5e-6, 2e-5), torch.bfloat16: (5e-2, 1e-3, 1.5e-1)}
"""Most error of logits, loss and any parameter's gradient, relative to the largest value.

fp32: the published code's own rounding, sums in another order; the bounds of the tests on CPU. bf16: a rounding is
2^-9 of a value, and some eight of them in each of the three blocks come to about 1e-2 at a logit and several times
that at a gradient that is a difference of large terms; the loss is an average. A wrong term is of order 1.
"""
FAR = 2**31
"""Elements past which an offset in 32 bits wraps."""
SCAN_BYTES_PER_FAR_ELEMENT = 22
"""u, dt, z, y, their gradients and the output of the scan before the slice: 9 tensors in bf16; the others are small."""


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to check (all)")
    options = parser.parse_or_leave()
    print(f"{datetime.date.today()} · {device_name(options.device)} · torch {torch.__version__}")
    sys.exit(0 if all_right(dict.fromkeys(options.only), options.device) else 1)


def all_right(parts: Iterable[str], device: str) -> bool:
    """Print what the parts find, and whether all of it is right."""
    wrong = 0
    for part in parts:
        print(flush=True)
        wrong += PARTS[part](device)
        give_memory_back(device)
    print(f"\n{wrong} of these are wrong\n" if wrong else "\nall right\n", flush=True)
    return not wrong


def check_ops(device: str) -> int:
    """How many ops are wrong. Every check returns such a number."""
    print("| op | type | largest error, relative to the largest value | of | same bits in two runs | |")
    print("|---|---|---|---|---|---|")
    torch.manual_seed(0)
    with torch.device(device):
        cases = list(every_case(small=device == "cpu"))
    return sum(check_case(case, dtype) for case in cases for dtype in OPS)


def check_case(case: Case, dtype: torch.dtype) -> bool:
    operands = {n: t.to(dtype if n in ACTIVATIONS else torch.float32) for n, t in case.operands.items()}
    expected = differentiate(case.define, {n: t.double() for n, t in operands.items()})
    with patch.object(scan_launches, "REPLAY_BYTES", case.replay_bytes):
        first, second = (differentiate(case.run, operands) for _ in range(2))
    errors = {name: error_of(found, expected[name]) for name, found in first.items()}
    worst = max(errors, key=errors.__getitem__)
    same = all(torch.equal(first[name], second[name]) for name in first)
    right = errors[worst] < OPS[dtype] and same
    told = f"{errors[worst]:.1e} | {worst} | {'yes' if same else 'NO'} | {'ok' if right else 'WRONG'}"
    print(f"| {case.name} | {short(dtype)} | {told} |", flush=True)
    return not right


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_golden(device: str) -> int:
    print("| published model | type | error of logits | of loss | of gradients | |\n|---|---|---|---|---|---|")
    wrong = 0
    for name in NAMES:
        golden = load_golden(name)
        golden.tensors = {key: tensor.to(device) for key, tensor in golden.tensors.items()}
        for dtype, bounds in GOLDEN.items():
            model = golden.model("triton").to(device)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                output = model(golden["input_ids"], golden["labels"])
            output.loss.backward()
            errors = (
                relative_error(output.logits, golden["logits"]),
                relative_error(output.loss, golden["loss"]),
                max(golden.gradient_errors(model).values()),
            )
            right = all(error < bound for error, bound in zip(errors, bounds, strict=True))
            told = " | ".join(f"{e:.1e}" for e in errors)
            print(f"| {name} | {short(dtype)} | {told} | {'ok' if right else 'WRONG'} |", flush=True)
            wrong += not right
    return wrong


def check_same_bits(device: str) -> int:
    """Loss and every gradient of a training step under bf16 autocast, and of the scan, from the same operands."""
    print("| twice | same bits |\n|---|---|")
    # Few states are where the backward kernel's turns over them come closest to one another.
    small = device == "cpu"
    channels, states, length = (5, (1, 2), 12) if small else (512, (1, 2, 16), 131_072)
    width, layers = (8, 1) if small else (256, 16)
    runs: dict[str, Callable[[], Callable[[], list[Tensor]]]] = {}
    for count in states:
        name = f"scan, {length} x {channels}, {count} state{'s' * (count > 1)}"
        runs[name] = lambda count=count: prepare_scan(device, length, channels, count)
    for name, rcps, batch, bases in (
        ("Caduceus-Ph", False, 1, length),
        ("Caduceus-PS", True, 1, length),
        ("Caduceus-PS", True, 2, 9 if small else 1037),
    ):
        config = CaduceusConfig(d_model=width, n_layer=layers, rcps=rcps)
        label = f"step of {name} {width}/{layers}, {batch} x {bases}"
        runs[label] = lambda config=config, batch=batch, bases=bases: prepare_step(config, batch, bases, device)
    wrong = 0
    for name, prepare in runs.items():
        try:
            run = prepare()
            first, second = ([t.cpu() for t in run()] for _ in range(2))
            same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            told = "yes" if same else "NO"
        except torch.OutOfMemoryError:
            same, told = True, "not checked: out of memory"
        run = first = second = None
        give_memory_back(device)
        print(f"| {name} | {told} |", flush=True)
        wrong += not same
    same = strands_mirror(device, *((16, 5, 2) if small else (4096, 512, 16)))
    print(f"| scan of a strand, and of its reverse complement | {'yes' if same else 'NO'} |", flush=True)
    return wrong + (not same)


def strands_mirror(device: str, length: int, channels: int, states: int) -> bool:
    """Whether stream 1, given the flip of stream 0, gives the flip of its output and gradients, to the bit.

    For a length that chunks divide, as their borders are then mirrored too.
    """
    from caduceus.ops.triton import scan_with_states

    with torch.device(device):
        inputs = scan_inputs(2, 2, 1, length, channels, states)
    leaves = {n: t.to(torch.bfloat16 if n in ACTIVATIONS else torch.float32) for n, t in inputs.items()}
    del leaves["state"]
    for name in ACTIVATIONS & leaves.keys():
        leaves[name].select(-4, 1).copy_(leaves[name].select(-4, 0).flip(-2))
    # On the CPU a chunk is 32 tokens, and of these the shortest there is.
    operands = scan_operands({n: t.requires_grad_() for n, t in leaves.items()})
    y, _ = scan_with_states(operands, chunk=8 if device == "cpu" else None)
    moving = [leaves[n] for n in ("u", "dt", "B", "C", "z")]
    results = [y, *torch.autograd.grad(y, moving, y.detach())]
    return all(torch.equal(t.select(-4, 1), t.select(-4, 0).flip(-2)) for t in results)


def prepare_scan(device: str, length: int, channels: int, states: int) -> Callable[[], list[Tensor]]:
    from caduceus.ops.triton import scan_with_states

    with torch.device(device):
        inputs = scan_inputs(2, 1, 1, length, channels, states)
    leaves = {
        n: t.to(torch.bfloat16 if n in ACTIVATIONS else torch.float32).requires_grad_() for n, t in inputs.items()
    }

    def run() -> list[Tensor]:
        y, final = scan_with_states(scan_operands(leaves), initial_state=leaves["state"])
        gradients = torch.autograd.grad((y, final), list(leaves.values()), (y.detach(), final.detach()))
        return [y.detach(), final.detach(), *gradients]

    return run


def prepare_step(config: CaduceusConfig, batch: int, length: int, device: str) -> Callable[[], list[Tensor]]:
    torch.manual_seed(0)
    model = CaduceusForMaskedLM(config, backend="triton").to(device)
    input_ids, labels = make_batch(batch, length, device)

    def run() -> list[Tensor]:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids, labels, return_logits=False).loss
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    return run


def make_batch(batch: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    input_ids = torch.randint(7, 11, (batch, length), device=device)
    labelled = torch.rand(input_ids.shape, device=device) < 0.15
    return input_ids, torch.where(labelled, input_ids, IGNORE_LABEL)


def check_far_offsets(device: str) -> int:
    if device != "cuda":
        print("offsets past 2^31 elements: only on a GPU")
        return 0
    free, needed = torch.cuda.mem_get_info()[0], SCAN_BYTES_PER_FAR_ELEMENT * FAR
    if free < needed:
        gib = f"{free / 2**30:.0f} GiB free of the {needed / 2**30:.0f} needed"
        print(f"offsets past 2^31 elements: not checked, {gib}")
        return 0
    wrong = 0
    for name, check in (("convolution", far_convolution_error), ("scan", far_scan_error)):
        error = check(FAR // 512 + 100, 512, device)
        give_memory_back(device)
        # Both sides are rounded to bf16, each by 2^-9; chunks of the scan begin elsewhere. A wrong term is of order 1.
        right = error < 1e-2
        told = f"the last tokens differ by {error:.1e} from these tokens alone: {'ok' if right else 'WRONG'}"
        print(f"offsets past 2^31 elements, {name}: {told}", flush=True)
        wrong += not right
    return wrong


def far_convolution_error(length: int, channels: int, device: str, last: int = 64) -> float:
    """Largest error at the last tokens, of the output in both directions and of x's gradient, in bf16."""
    from caduceus.ops.triton import bidirectional_conv1d

    x = torch.randn(1, 1, length, channels, dtype=torch.bfloat16, device=device)
    weight = torch.randn(2, channels, 4, device=device)
    near = x[:, :, -last:]
    halo = torch.zeros(2, 1, 1, 3, channels, dtype=x.dtype, device=device)
    halo[0] = x[:, :, -last - 3 : -last]
    dy = torch.randn(2, 1, 1, last, channels, device=device).to(x.dtype)

    expected = with_gradients(lambda x: bidirectional_conv1d(x, weight, None, halo=halo), [near], dy)
    found = with_gradients(lambda x: bidirectional_conv1d(x, weight, None), [x], dy)
    return max(relative_error(f[..., -last:, :].float(), e.float()) for f, e in zip(found, expected, strict=True))


def far_scan_error(length: int, channels: int, device: str, last: int = 64) -> float:
    """As for the convolution, left-to-right; the state before the last tokens is the final one of all tokens before."""
    from caduceus.ops.triton import scan_with_states

    u, dt, z = (torch.randn(1, 1, 1, length, channels, dtype=torch.bfloat16, device=device) for _ in range(3))
    dt -= 4
    B, C = (torch.randn(1, 1, 1, length, 16, dtype=torch.bfloat16, device=device) for _ in range(2))
    A = -torch.rand(1, channels, 16, device=device) - 0.1
    dy = torch.randn(1, 1, last, channels, device=device).to(u.dtype)

    def scan(u, dt, B, C, z, state=None):
        return scan_with_states(ScanOperands(u, dt, A, B, C, z=z), initial_state=state)

    operands = [u, dt, B, C, z[0]]
    _, state = scan(*(t[..., :-last, :] for t in operands))
    expected = with_gradients(lambda *t: scan(*t, state)[0], [t[..., -last:, :] for t in operands], dy)
    found = with_gradients(lambda *t: scan(*t)[0], operands, dy)
    return max(relative_error(f[..., -last:, :].float(), e.float()) for f, e in zip(found, expected, strict=True))


def with_gradients(run, tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    """The output and the tensors' gradients, where `dy` is the output's gradient at the last tokens, the others' 0."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = run(*leaves)
    arriving = torch.zeros_like(y)
    arriving[..., -dy.shape[-2] :, :] = dy
    return [y.detach(), *torch.autograd.grad(y, leaves, arriving)]


PARTS = {"ops": check_ops, "golden": check_golden, "bits": check_same_bits, "far": check_far_offsets}

if __name__ == "__main__":
    main()
