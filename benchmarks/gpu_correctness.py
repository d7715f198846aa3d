"""What gpu_step.py checks before it takes any time: an assertion that fails means that the kernels are wrong.

The ops against fp64; the golden files, which are outputs and gradients of the published implementation; a model's step
twice; and tensors of more than 2^31 elements, whose offsets do not fit in 32 bits.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

from caduceus.alphabet import IGNORE_LABEL
from caduceus.config import CaduceusConfig
from caduceus.model.caduceus import CaduceusForMaskedLM
from caduceus.ops import add_norm, bidirectional_conv1d, bidirectional_scan, head_cross_entropy

sys.path.append(str(Path(__file__).parents[1]))  # the tests are not installed
from tests.model.golden import NAMES, load_golden, relative_error

WRONG = "the kernels are wrong: no timings"
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


def check_correctness(device: str, backend: str) -> None:
    check_ops(device, backend)
    print()
    check_golden(device, backend)
    print()
    check_same_bits_of_a_step(device, backend)
    check_far_offsets(device)


def check_golden(device: str, backend: str) -> None:
    print("| published model | dtype | error of logits | of loss | of gradients |\n|---|---|---|---|---|")
    for name in NAMES:
        golden = load_golden(name)
        golden.tensors = {key: tensor.to(device) for key, tensor in golden.tensors.items()}
        for dtype, bounds in GOLDEN.items():
            model = golden.model(backend).to(device)
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                output = model(golden["input_ids"], golden["labels"])
            output.loss.backward()
            gradient = max(golden.gradient_errors(model).values())
            errors = (
                relative_error(output.logits, golden["logits"]),
                relative_error(output.loss, golden["loss"]),
                gradient,
            )
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | " + " | ".join(f"{e:.1e}" for e in errors) + " |")
            assert all(error < bound for error, bound in zip(errors, bounds, strict=True)), WRONG


def check_same_bits_of_a_step(device: str, backend: str) -> None:
    """Loss and every gradient of Caduceus-PS in bf16 autocast, from the same weights and batch."""
    torch.manual_seed(0)
    config = CaduceusConfig(d_model=64, n_layer=2, rcps=True)
    model = CaduceusForMaskedLM(config, backend=backend).to(device)
    input_ids, labels = make_batch(2, 1037, device)
    runs = []
    for _ in range(2):
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids, labels, return_logits=False).loss
        runs.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    same = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    print(f"a model's step twice: {'the same' if same else 'NOT the same'} bits of the loss and of every gradient")
    assert same, WRONG


def make_batch(batch: int, length: int, device: str) -> tuple[Tensor, Tensor]:
    input_ids = torch.randint(7, 11, (batch, length), device=device)
    labelled = torch.rand(input_ids.shape, device=device) < 0.15
    return input_ids, torch.where(labelled, input_ids, IGNORE_LABEL)


def check_far_offsets(device: str) -> None:
    if device != "cuda":
        print("offsets past 2^31 elements: only on a GPU")
        return
    free, needed = torch.cuda.mem_get_info()[0], SCAN_BYTES_PER_FAR_ELEMENT * FAR
    if free < needed:
        print(
            f"offsets past 2^31 elements: not checked, {free / 2**30:.0f} GiB free of the {needed / 2**30:.0f} needed"
        )
        return
    for name, check in (("convolution", far_convolution_error), ("scan", far_scan_error)):
        error = check(FAR // 512 + 100, 512, device)
        torch.cuda.empty_cache()
        print(f"offsets past 2^31 elements, {name}: the last tokens differ by {error:.1e} from these tokens alone")
        # Both sides are rounded to bf16, each by 2^-9; chunks of the scan begin elsewhere. A wrong term is of order 1.
        assert error < 1e-2, WRONG


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
    """As of the convolution, left-to-right; the state before the last tokens is the final one of all tokens before."""
    from caduceus.ops.triton import scan_with_states

    u, dt, z = (torch.randn(1, 1, 1, length, channels, dtype=torch.bfloat16, device=device) for _ in range(3))
    dt -= 4
    B, C = (torch.randn(1, 1, 1, length, 16, dtype=torch.bfloat16, device=device) for _ in range(2))
    A = -torch.rand(1, channels, 16, device=device) - 0.1
    dy = torch.randn(1, 1, last, channels, device=device).to(u.dtype)

    def scan(u, dt, B, C, z, state=None):
        return scan_with_states(u, dt, A, B, C, None, z, None, initial_state=state)

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


def check_ops(device: str, backend: str) -> None:
    """The ops with all gradients, over two directions and strands, against fp64; and the same bits twice."""
    print("| ops | dtype | largest error, relative to the largest value | same bits in two runs |\n|---|---|---|---|")
    for name, make, run in (
        ("convolution and scan", make_operands, mix),
        ("norm and loss", make_head_operands, predict),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            operands = make(device, dtype)
            reference = run([t.double() for t in operands], "naive")
            first, second = (run(operands, backend) for _ in range(2))
            error = max(
                ((right - found.double()).abs().max() / right.abs().max()).item()
                for right, found in zip(reference, first, strict=True)
            )
            same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | {error:.1e} | {'yes' if same else 'NO'} |")
            # 24 bits through sums of hundreds of terms; 8 bits, rounded at the convolution and twice in the scan.
            assert error < {torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype], WRONG


def make_operands(device: str, dtype: torch.dtype) -> list[Tensor]:
    S, P, batch, length, E, N, K = 2, 2, 2, 333, 200, 16, 4
    generator = torch.Generator().manual_seed(0)
    shapes = [(S, batch, length, E), (P, E, K), (P, E), (P, S, batch, length, E)]
    shapes += [(P, E, N), (P, S, batch, length, N), (P, S, batch, length, N), (P, E), (S, batch, length, E), (P, E)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors[3] -= 4  # step sizes of some hundredths, as in training
    tensors[4] = -tensors[4].abs() - 0.1
    activations = (0, 3, 5, 6, 8)
    return [t.to(device, dtype if i in activations else torch.float32) for i, t in enumerate(tensors)]


def mix(operands: list[Tensor], backend: str) -> list[Tensor]:
    """Output and gradients of convolution and scan."""
    leaves = [t.detach().requires_grad_() for t in operands]
    x, weight, bias, dt, A, B, C, D, z, dt_bias = leaves
    u = bidirectional_conv1d(x, weight, bias, backend=backend)
    y = bidirectional_scan(u, dt, A, B, C, D, z, dt_bias, backend=backend)
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.device, torch.bfloat16).to(y.dtype)
    return [y, *torch.autograd.grad(y, leaves, gradient)]


def make_head_operands(device: str, dtype: torch.dtype) -> list[Tensor]:
    S, batch, length, D, V = 2, 2, 333, 200, 16
    generator = torch.Generator().manual_seed(0)
    shapes = (S, batch, length, D), (S, batch, length, D), (S, D), (S, V, D)
    hidden, *others = (torch.randn(shape, generator=generator).to(device) for shape in shapes)
    return [hidden.to(dtype), *others]


def predict(operands: list[Tensor], backend: str) -> list[Tensor]:
    """The final norm and the loss at half of the tokens, with gradients."""
    leaves = [t.detach().requires_grad_() for t in operands]
    hidden, residual, norm, head = leaves
    labels = torch.randint(7, 11, hidden.shape[1:3], generator=torch.Generator().manual_seed(1))
    labels[:, ::2] = IGNORE_LABEL
    normed, _ = add_norm(hidden, residual, norm, eps=1e-5, backend=backend)
    loss, _ = head_cross_entropy(normed, head, labels.to(hidden.device), ignore_label=IGNORE_LABEL, backend=backend)
    return [normed, loss, *torch.autograd.grad(loss, leaves)]
