import pytest
import torch

from caduceus import ops
from caduceus.ops.triton import cross_entropy
from tests.ops.sparse import FAR, sparse

IGNORE = 4
# fp32 throughout; sums of up to 100 terms of order 1.
FP32 = 1e-5
# The gradient of hidden is rounded once: fp16 to nearest, 2^-11; bf16, which the interpreter truncates (a GPU does
# not), 2^-7.
HALF = {torch.float16: 5e-4, torch.bfloat16: 8e-3}


def compare(
    streams: int, shape: tuple[int, int], D: int, weighted: bool, labelled: float, dtype=torch.float32, tolerance=FP32
):
    generator = torch.Generator(torch.get_default_device()).manual_seed(shape[1])
    hidden = torch.randn(streams, *shape, D, generator=generator).to(dtype)
    weight = torch.randn(streams, 16, D, generator=generator) / D**0.5
    labels = torch.randint(7, 11, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) >= labelled] = IGNORE
    loss_weights = torch.rand(shape, generator=generator) if weighted else None
    of_sequence = 1.0 + torch.arange(shape[0])  # so that none passes for another in the gradients
    results = {}
    for backend in ("naive", "triton"):
        h, w = ((t.double() if backend == "naive" else t).detach().requires_grad_() for t in (hidden, weight))
        loss, total = ops.head_cross_entropy(h, w, labels, loss_weights, ignore_label=IGNORE, backend=backend)
        results[backend] = [loss, total, *torch.autograd.grad(3 * loss @ of_sequence.to(loss.dtype), [h, w])]
    for right, found in zip(results["naive"], results["triton"], strict=True):
        assert found.shape == right.shape
        assert (right - found.double()).abs().max() <= tolerance * right.abs().max()


def test_two_streams_are_summed_before_the_softmax():
    compare(2, (1, 40), 20, weighted=True, labelled=0.3)


def test_the_sums_of_each_sequence():
    compare(1, (3, 21), 4, weighted=True, labelled=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("streams", "shape", "D", "labelled"), [(1, (1, 1), 1, 1.0), (3, (3, 33), 65, 0.2), (1, (5, 14), 64, 1.0)]
)
def test_sizes(streams, shape, D, labelled, weighted):
    compare(streams, shape, D, weighted, labelled)


def test_nothing_labelled_is_zero_with_zero_gradient():
    compare(2, (2, 35), 8, weighted=False, labelled=0.0)


@pytest.mark.parametrize("label", [-100, 16, 2**40])
def test_a_label_outside_the_vocabulary_makes_the_loss_and_its_gradients_nan(label):
    hidden, weight = torch.randn(1, 1, 3, 8, requires_grad=True), torch.randn(1, 16, 8, requires_grad=True)
    loss, total = ops.head_cross_entropy(
        hidden, weight, torch.tensor([[7, label, IGNORE]]), ignore_label=IGNORE, backend="triton"
    )
    to_hidden, to_weight = torch.autograd.grad(loss, [hidden, weight])
    assert loss.isnan() and total == 2
    assert to_hidden[0, 0].isnan().all(1).tolist() == [False, True, False]
    assert to_weight.isnan().all()


def test_an_ignored_label_may_lie_outside_the_vocabulary():
    results = []
    torch.manual_seed(0)
    operands = torch.randn(1, 1, 3, 8), torch.randn(1, 16, 8)
    for ignore in (IGNORE, -100):
        leaves = [t.clone().requires_grad_() for t in operands]
        loss, _ = ops.head_cross_entropy(*leaves, torch.tensor([[7, ignore, 9]]), ignore_label=ignore, backend="triton")
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_two_runs_give_the_same_bits():
    torch.manual_seed(0)
    leaves = [torch.randn(s, requires_grad=True) for s in ((2, 1, 70, 65), (2, 16, 65))]
    labels = torch.randint(7, 11, (1, 70))
    results = []
    for _ in range(2):
        loss, _ = ops.head_cross_entropy(*leaves, labels, ignore_label=IGNORE, backend="triton")
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_offsets_past_2_to_the_31(tmp_path, device, monkeypatch):
    """In the loss, a tile without a label is not read. Gradients of all of hidden are written, which takes its room."""
    if device.type != "cpu":
        pytest.skip("a GPU has no sparse memory")
    monkeypatch.setattr(cross_entropy, "CHANNELS", 2**15)  # of few turns, and few tokens to pass over
    D, last = 2**20, cross_entropy.ROWS
    tokens = FAR // D // last * last + last
    torch.manual_seed(0)
    near = torch.randn(1, 1, last, D).bfloat16()
    far = sparse(tokens * D, tmp_path / "hidden").view(1, 1, tokens, D)
    far[:, :, -last:] = near
    weight = torch.randn(1, 16, D) / D**0.5
    labels = torch.full((1, tokens), IGNORE)
    labels[0, -last:] = torch.randint(7, 11, (last,))
    found = [
        ops.head_cross_entropy(hidden, weight, own, ignore_label=IGNORE, backend="triton")
        for hidden, own in ((near, labels[:, -last:]), (far, labels))
    ]
    assert found[0] == found[1] and found[0][1] == last


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision(dtype):
    compare(2, (2, 20), 20, True, 0.5, dtype, HALF[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
def test_composes_with_torch(weighted):
    from caduceus.ops.triton.cross_entropy import cross_entropy_backward, cross_entropy_forward

    tensors = (
        torch.randn(1, 1, 5, 8),
        torch.randn(1, 16, 8),
        torch.full((1, 5), 7),
        torch.rand(1, 5) if weighted else None,
    )
    torch.library.opcheck(cross_entropy_backward, (torch.ones(1), *tensors, IGNORE))
    for leaf in tensors[:2]:
        leaf.requires_grad_()
    torch.library.opcheck(cross_entropy_forward, (*tensors, IGNORE))
