"""Which stage of its configuration a run has reached."""

import json

from caduceus.config import Config, Stage, stages_of
from caduceus.distributed.ranks import Ranks
from caduceus.errors import UserError
from caduceus.run.directory import RunDirectory

_MAY_CHANGE = ("train.micro_batch",)
"""Keys whose values in a stage may change at any start."""
_STAY = ("data.seq_len", "train.global_batch", "train.steps")
"""Keys that a stage keeps once it has begun, whatever `run.allow_change` names."""


def stage_to_run(config: Config, ranks: Ranks) -> Stage:
    """The stage that the run goes on with: that of its newest whole checkpoint, or the first. All ranks call it
    together.

    Raises `UserError` where the configuration of a stage that has begun was changed.
    """
    stages, number = stages_of(config), 1
    if config.train.stages:
        run = RunDirectory(config.run.dir)
        with ranks.agreeing(), run.telling_of_disks():
            if ranks.is_main:
                number = _number(run, stages)
        number = ranks.broadcast(number)
    return stages[number - 1]


def _number(run: RunDirectory, stages: list[Stage]) -> int:
    checkpoint = run.newest_valid_checkpoint()
    if checkpoint is None:
        return 1
    progress = json.loads((checkpoint.path / "progress.json").read_text())
    number, before = progress.get("stage", 1), progress.get("steps_before", 0)
    if number > len(stages):
        raise UserError(f"train.stages: the run is in stage {number}, but there are {len(stages)}; give it as it was")
    former = checkpoint.config()
    for then, now in zip(stages_of(former)[:number] if former else [], stages, strict=False):
        _refuse_other(then, now)
    is_over = progress["step"] - before == stages[number - 1].config.train.steps
    return min(number + is_over, len(stages))


def _refuse_other(then: Stage, now: Stage) -> None:
    allowed = {*_MAY_CHANGE, *now.run.run.allow_change} - {*_STAY}
    before = then.values()
    for key, value in now.values().items():
        if value != before[key] and key not in allowed:
            raise UserError(
                f"train.stages: stage {now.number} has begun with {key}={before[key]}, not {value}; give it as it was "
                "(stages to come may change, by run.allow_change=[train.stages]), or choose another run.dir"
            )
