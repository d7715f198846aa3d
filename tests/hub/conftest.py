import pytest

from tests.model.conftest import golden  # noqa: F401 (a fixture)
from tests.model.golden import Golden, load_golden


@pytest.fixture
def golden_ps() -> Golden:
    return load_golden("ps_fused")
