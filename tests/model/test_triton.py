"""Whole models through the interpreted Triton kernels, the golden files among them."""

import pytest

from tests.interpreter import OF_MODELS, run_interpreted


@pytest.mark.slow
def test_interpreted_models():
    run_interpreted("slow", *OF_MODELS)
