"""A micro-batch on its way to a device."""

import torch

from caduceus.alphabet import IGNORE_LABEL
from caduceus.data import Batch


def test_what_a_batch_counts_for_is_counted_before_it_leaves_the_cpu() -> None:
    """The device `meta` has no numbers: nobody could count there."""
    labels = torch.tensor([[7, IGNORE_LABEL, 9], [IGNORE_LABEL, 8, 10]], dtype=torch.int8)
    weights = torch.tensor([[0.5, 1.0, 0.25], [1.0, 0.1, 2.0]])
    for given, expected in ((None, 4.0), (weights, weights.double()[labels != IGNORE_LABEL].sum().item())):
        batch = Batch(torch.zeros(2, 3, dtype=torch.uint8), labels, given, torch.arange(2))
        weight = batch.to("meta").label_weight()
        assert weight.dtype == torch.float64 and weight.item() == expected == batch.label_weight().item()
