"""What tests of loaders take from them, and compare."""

import itertools

import torch

from caduceus.data import Batch


def take(loader: object, count: int) -> list:
    return list(itertools.islice(loader, count))


def assert_same(ones: list[Batch], others: list[Batch]) -> None:
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        for name in ("input_ids", "labels", "loss_weights", "g"):
            first, second = getattr(one, name), getattr(other, name)
            assert (first is None and second is None) or torch.equal(first, second)
