"""Keys say everything about themselves."""

from pathlib import Path

import pytest

from caduceus.config import KEYS
from caduceus.config.keys import FIXES
from caduceus.config.reference import reference
from caduceus.errors import UserError
from tests.conftest import REPOSITORY


@pytest.mark.parametrize("key", KEYS.values(), ids=lambda key: key.name)
def test_a_key_has_words_and_a_default_that_it_may_have(key) -> None:
    assert key.words.endswith((".", ".)"))
    assert key.fixes in FIXES
    if key.default is not None:
        key.check(key.default)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("data.mask_prob", 1.01, "must be between 0 and 1, got 1.01"),
        ("data.mask_prob", -0.01, "must be between 0 and 1, got -0.01"),
        ("train.steps", 0, "must be at least 1, got 0"),
        ("train.betas", [0.9, 1.0], "must be at least 0 and below 1, got 1.0"),
        ("train.betas", [float("nan"), 0.9], "must be a finite number, got nan"),
        ("model.norm_epsilon", 0.0, "must be above 0, got 0.0"),
        ("run.time_budget_minutes", float("inf"), "must be a finite number, got inf"),
        ("parallel.zero_stage", 4, "choose one of 0, 1, 2, 3; got '4'"),
    ],
)
def test_what_a_key_cannot_be_is_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        KEYS[name].check(value)
    assert str(refusal.value) == f"{name}: {message}"


@pytest.mark.parametrize(
    ("name", "value"), [("data.mask_prob", 0), ("data.mask_prob", 1), ("train.warmup_steps", None)]
)
def test_bounds_may_be_reached_and_null_has_none(name: str, value: object) -> None:
    KEYS[name].check(value)


def test_the_reference_in_docs_is_what_the_keys_say() -> None:
    page = Path(REPOSITORY / "docs" / "configuration.md").read_text()
    assert page == reference(), "run `make docs`"
    assert all(f"| `{name}` |" in page for name in KEYS)
