import pytest

from tests.model.golden import NAMES, Golden, load_golden


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)
