"""Whole models through the interpreted Triton kernels: a file of its own, which can run beside that of the ops."""

import pytest

from tests.interpreter import INTERPRETED, run_interpreted


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a whole file of tests, interpreted
def test_interpreted_models():
    run_interpreted("slow", INTERPRETED / "test_triton_model.py")
