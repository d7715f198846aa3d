"""The published implementation's golden files through the Triton kernels."""

import pytest
import torch

from tests.model.golden import NAMES, load_golden, relative_error

# The published code's own rounding, in fp32, sums in another order: the same bounds as for the other backends.
VALUES, GRADIENTS = 5e-6, 2e-5
# A backward pass takes four times as long as a forward pass. Of those that are left out, the longest, gradients are
# compared on rows that are shorter, with those of the cpu backend, which has the published ones.
WITHOUT_GRADIENTS = {"ph_multiply", "ph_untied", "ps_unfused", "ps_untied_fused"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_are_the_published_ones(name, device):
    golden = load_golden(name)
    golden.tensors = {key: tensor.to(device) for key, tensor in golden.tensors.items()}
    model = golden.model("triton").to(device)
    with torch.set_grad_enabled(name not in WITHOUT_GRADIENTS):
        output = model(golden["input_ids"], golden["labels"])
    assert relative_error(output.logits, golden["logits"]) < VALUES
    assert relative_error(output.loss, golden["loss"]) < VALUES
    if name in WITHOUT_GRADIENTS:
        return
    output.loss.backward()
    for parameter, error in golden.gradient_errors(model).items():
        assert error < GRADIENTS, parameter
