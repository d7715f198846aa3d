"""The Triton kernels in the interpreter. For whole models, see tests/model/test_triton.py."""

import pytest

from tests.interpreter import INTERPRETED, OF_MODELS, run_interpreted


@pytest.mark.moderate
def test_interpreted_kernels():
    run_interpreted("not slow")


@pytest.mark.slow
def test_interpreted_kernels_over_more_shapes():
    run_interpreted("slow", *sorted({path.name for path in INTERPRETED.glob("test_*.py")} - set(OF_MODELS)))
