"""A decay that is branched off from a checkpoint is the one that the run itself would have made."""

from pathlib import Path

import pytest

from caduceus.config import Config
from caduceus.errors import UserError
from caduceus.run.directory import RunDirectory
from caduceus.train.trainer import train
from tests.train.conftest import SmallRun, numbers

STABLE = {"steps": 12, "schedule": "wsd", "decay_steps": 4, "warmup_steps": 2}


@pytest.fixture(scope="module")
def trunk(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run of twelve steps, the last four of them its decay; it keeps its newest checkpoint only."""
    small_run = SmallRun(small_shards, tmp_path_factory.mktemp("trunk"))
    config = small_run.config("trunk", train=STABLE, valid={"every": 0}, checkpoint={"every": 5, "keep": 1})
    assert train(config) == 0
    return config


def branch(small_run: SmallRun, trunk: Config, step: int = 8, **keys: object) -> Config:
    path = str(RunDirectory(trunk.run.dir).checkpoint_path(step))
    values = {**STABLE, "decay_steps": None, "decay_from": path, **keys}
    return small_run.config("branch", train=values, valid={"every": 0}, checkpoint={"every": 3})


@pytest.mark.moderate
def test_the_checkpoint_where_the_rate_begins_to_fall_is_kept(trunk: Config) -> None:
    assert [checkpoint.step for checkpoint in RunDirectory(trunk.run.dir).checkpoints()] == [8, 12]
    rates = [row["lr"] for row in numbers(trunk.run.dir)]
    assert rates[2:9] == [8e-3] * 7 and rates[8:] == sorted(rates[8:], reverse=True) and rates[11] < 2e-3


@pytest.mark.moderate
def test_a_branch_makes_the_numbers_of_the_run_that_it_left_also_when_it_stops(
    small_run: SmallRun, trunk: Config
) -> None:
    config = branch(small_run, trunk)
    config.run.time_budget_minutes = 1e-6
    statuses = [train(config) for _ in range(4)]
    assert statuses[-1] == 0 and 0 not in statuses[:-1]
    assert numbers(config.run.dir) == numbers(trunk.run.dir)[8:]


@pytest.mark.moderate
def test_a_longer_branch_stays_at_its_rate_first(small_run: SmallRun, trunk: Config) -> None:
    config = branch(small_run, trunk, steps=13, decay_steps=3)
    assert train(config) == 0
    rates = [row["lr"] for row in numbers(config.run.dir)]
    assert rates[:3] == [8e-3] * 3 and rates[3] < 8e-3 and len(rates) == 5
    assert 10 in [checkpoint.step for checkpoint in RunDirectory(config.run.dir).checkpoints()]


@pytest.mark.parametrize(
    ("step", "keys", "words"),
    [
        (7, {}, "step-00000007 is not a complete checkpoint; give one such as RUN/checkpoints/step-00001000"),
        (12, {"steps": 20}, "is within the decay, which began after step 8; give an earlier one"),
        (8, {"lr": 1e-3}, r"belongs to a run with train\.lr=0\.008, not 0\.001; .* run\.allow_change=\[train\.lr\]"),
        (8, {"seed": 7}, r"belongs to a run with train\.seed=0, not 7; give the same$"),
        (8, {"steps": 8}, r"train\.steps: the decay would begin after step 7, but .* has made 8; give more steps"),
    ],
)
def test_what_cannot_be_a_branch_is_refused_before_anything_is_written(
    small_run: SmallRun, trunk: Config, step: int, keys: dict, words: str
) -> None:
    config = branch(small_run, trunk, step, **keys)
    with pytest.raises(UserError, match=words):
        train(config)
    assert not Path(config.run.dir).exists()


@pytest.mark.moderate
def test_a_link_that_moves_on_and_a_damaged_checkpoint_are_refused(small_run: SmallRun, trunk: Config) -> None:
    config = branch(small_run, trunk)
    config.train.decay_from = str(RunDirectory(trunk.run.dir).checkpoints_path / "latest")
    with pytest.raises(UserError, match="latest is not the name of a checkpoint"):
        train(config)
    config = branch(small_run, trunk)
    weights = Path(config.train.decay_from) / "rng.pt"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    with pytest.raises(UserError, match=r"is damaged: rng\.pt does not match its sha256"):
        train(config)
    weights.write_bytes(whole)


@pytest.mark.moderate
def test_once_the_rate_falls_the_end_stays(small_run: SmallRun, trunk: Config) -> None:
    config = branch(small_run, trunk)
    assert train(config) == 0
    config.train.steps, config.run.allow_change = 20, ["train.steps"]
    with pytest.raises(UserError, match="falls from step 8 to the end at step 12, and would rise again"):
        train(config)


@pytest.mark.parametrize("key", ["decay_steps", "decay_from"])
def test_a_decay_without_wsd_is_refused(small_run: SmallRun, key: str) -> None:
    with pytest.raises(UserError, match=rf"train\.{key}: has no effect under train\.schedule=cosine"):
        small_run.config("run", train={key: 2 if key == "decay_steps" else "elsewhere"})
