"""The Triton kernels in the interpreter. For whole models, see tests/model/test_triton*.py."""

import pytest

from tests.interpreter import INTERPRETED, run_interpreted

OF_MODELS = ("test_triton_model.py", "test_triton_golden.py")
SLOW = sorted(
    path.name
    for path in INTERPRETED.glob("test_*.py")
    if path.name not in OF_MODELS and "pytest.mark.slow" in path.read_text()
)


def test_interpreted_kernels():
    run_interpreted("not slow")


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a whole file of tests, interpreted
@pytest.mark.parametrize("name", SLOW)
def test_interpreted_kernels_over_more_shapes(name):
    run_interpreted("slow", INTERPRETED / name)
