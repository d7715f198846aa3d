"""The golden files through the interpreted Triton kernels: a file of its own, which can run beside the other models."""

import pytest

from tests.interpreter import INTERPRETED, run_interpreted


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a whole file of tests, interpreted
def test_interpreted_golden_files():
    run_interpreted("slow", INTERPRETED / "test_triton_golden.py")
