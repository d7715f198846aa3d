"""Operands that a kernel would misread are refused by name, whatever the backend; empty sequences are not."""

import pytest
import torch
from torch import Tensor

from caduceus import ops
from caduceus.ops import backends
from tests.ops.empty import check_empty_sequences

B, L, E, N, K, D, V, P, S = 2, 5, 4, 3, 4, 6, 16, 2, 2
RUNS = {
    "u": (B, L, E),
    "dt": (B, L, E),
    "A": (E, N),
    "B": (B, L, N),
    "C": (B, L, N),
    "D": (E,),
    "z": (B, L, E),
    "dt_bias": (E,),
}
BOTH = {
    name: ((S,) if name == "z" else (P,) if name in ("A", "D", "dt_bias") else (P, S)) + shape
    for name, shape in RUNS.items()
}
OPS = {
    "selective_scan": (RUNS | {"initial_state": (B, E, N), "starts": (B, L)}, {}),
    "bidirectional_scan": (BOTH | {"starts": (B, L)}, {}),
    "causal_conv1d": ({"x": (B, L, E), "weight": (E, K), "bias": (E,), "starts": (B, L)}, {}),
    "bidirectional_conv1d": ({"x": (S, B, L, E), "weight": (P, E, K), "bias": (P, E), "starts": (B, L)}, {}),
    "add_norm": ({"x": (S, B, L, D), "residual": (S, B, L, D), "weight": (S, D), "bias": (S, D)}, {"eps": 1e-5}),
    "head_cross_entropy": (
        {"hidden": (S, B, L, D), "weight": (S, V, D), "labels": (B, L), "loss_weights": (B, L)},
        {"ignore_label": 4},
    ),
}
OPTIONAL = {"D", "z", "dt_bias", "initial_state", "starts", "bias", "residual", "loss_weights"}
CASES = [(op, name) for op, (shapes, _) in OPS.items() for name in shapes]
FREE = {
    ("causal_conv1d", "weight", 1),
    ("bidirectional_conv1d", "weight", 2),
    ("bidirectional_conv1d", "x", 0),
    ("head_cross_entropy", "weight", 1),
}
"""Axes that no other operand has."""
DTYPES = {"starts": torch.bool, "labels": torch.int64}


def operands(op: str, device: str = "cpu") -> dict[str, Tensor]:
    """With `starts` or with an initial state, which do not go together."""
    shapes, _ = OPS[op]
    return {name: torch.ones(shape, dtype=DTYPES.get(name), device=device) for name, shape in shapes.items()}


def call(op: str, given: dict[str, Tensor], backend: str) -> None:
    getattr(ops, op)(**given, **OPS[op][1], backend=backend)


@pytest.mark.parametrize(("op", "name"), CASES)
@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_a_wrong_shape_is_refused_by_name(backend, op, name):
    right = operands(op)[name]
    shorter = [right.narrow(axis, 0, n - 1) for axis, n in enumerate(right.shape) if (op, name, axis) not in FREE]
    for tensor in (right[None], right[0], *shorter):
        # The first operand, or one that sizes are taken from, makes another one wrong.
        says = r"^\w+: (expected|axis)" if name in ("u", "x", "hidden", "weight", "A") else rf"^{name}: expected"
        with pytest.raises(ValueError, match=says):
            call(op, operands(op) | {name: tensor}, backend)


@pytest.mark.parametrize(("op", "name"), CASES)
def test_a_wrong_type_is_refused_by_name(op, name):
    types = {"starts": (torch.int64, torch.uint8), "labels": (torch.float32, torch.bool)}
    for dtype in types.get(name, (torch.int64, torch.complex64)):
        with pytest.raises(TypeError, match=rf"^{name}: expected"):
            call(op, operands(op) | {name: operands(op)[name].to(dtype)}, "naive")


def test_another_device_is_refused_by_name():
    for op in OPS:
        names = list(OPS[op][0])
        with pytest.raises(ValueError, match=rf"^{names[1]}: expected on cpu"):
            call(op, operands(op) | {names[1]: operands(op, "meta")[names[1]]}, "cpu")


def test_more_than_two_directions_are_refused():
    wide = {
        name: torch.cat([t, t[:1]]) if name != "starts" else t for name, t in operands("bidirectional_scan").items()
    }
    with pytest.raises(ValueError, match=r"^u: axis P has at most 2"):
        call("bidirectional_scan", wide, "naive")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_right_operands_are_taken_with_and_without_the_optional_ones(backend, op):
    given = operands(op)
    call(op, {name: None if name in OPTIONAL else t for name, t in given.items()}, backend)
    given.pop("initial_state", None)
    call(op, given, backend)


def test_packed_sequences_have_no_states_and_no_context():
    given = operands("selective_scan")
    with pytest.raises(ValueError, match=r"^starts: packed sequences have no initial_state"):
        call("selective_scan", given, "naive")
    for op in ("selective_scan", "bidirectional_scan", "causal_conv1d", "bidirectional_conv1d"):
        given = operands(op)
        given.pop("initial_state", None)
        with pytest.raises(ValueError, match=r"^starts: packed sequences cannot be shared .*parallel\.context"):
            getattr(ops, op)(**given, context=object(), backend="naive")


@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_an_empty_sequence_has_empty_results(backend):
    check_empty_sequences(backend)
