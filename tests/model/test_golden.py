"""The flip-free model against the published implementation's outputs. Triton's: test_triton.py."""

import pytest

from caduceus.hub import hidden_states_to_published
from tests.model.golden import relative_error

# fp32 rounding of both sides; measured at most 8e-7 (values) and 3e-6 (gradients) with the naive backend.
VALUES, GRADIENTS = 5e-6, 2e-5


@pytest.mark.parametrize("backend", ["naive", "cpu"])
def test_outputs_and_gradients_are_the_published_ones(golden, backend):
    model = golden.model(backend)
    output = model(golden["input_ids"], golden["labels"], output_hidden_states=True)
    output.loss.backward()
    hidden_states = golden.part("hidden")

    assert relative_error(output.logits, golden["logits"]) < VALUES
    assert relative_error(output.loss, golden["loss"]) < VALUES
    assert len(output.hidden_states) == len(hidden_states)
    for number, hidden in enumerate(hidden_states_to_published(output.hidden_states)):
        assert relative_error(hidden, hidden_states[str(number)]) < VALUES, f"hidden.{number}"
    for name, error in golden.gradient_errors(model).items():
        assert error < GRADIENTS, name

    weighted = model(golden["input_ids"], golden["labels"], golden["loss_weights"], return_logits=False)
    assert weighted.logits is None
    assert relative_error(weighted.loss, golden["weighted_loss"]) < VALUES
