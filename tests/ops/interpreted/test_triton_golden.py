"""The published implementation's golden files through the Triton kernels."""

import pytest
import torch

from tests.interpreter import INTERPRETING
from tests.model.golden import NAMES, load_golden, relative_error

# The published code's own rounding, in fp32, sums in another order: the same bounds as for the other backends.
VALUES, GRADIENTS = 5e-6, 2e-5
# A backward pass takes four times as long as a forward pass: the interpreter computes gradients of one model of each
# mixer, whose kernels the others share. What differs between models, test_triton_model.py compares on shorter rows.
WITH_GRADIENTS = {"ph_tied", "ps_mamba2_fused"} if INTERPRETING else set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_the_published_ones(name, device):
    golden = load_golden(name)
    golden.tensors = {key: tensor.to(device) for key, tensor in golden.tensors.items()}
    model = golden.model("triton").to(device)
    if name not in WITH_GRADIENTS:
        with torch.no_grad():
            logits = model(golden["input_ids"][:1]).logits
        assert relative_error(logits, golden["logits"][:1]) < VALUES
        return
    output = model(golden["input_ids"], golden["labels"])
    assert relative_error(output.logits, golden["logits"]) < VALUES
    assert relative_error(output.loss, golden["loss"]) < VALUES
    output.loss.backward()
    for parameter, error in golden.gradient_errors(model).items():
        assert error < GRADIENTS, parameter
