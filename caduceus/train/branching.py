"""A run that branches off another one: it begins at its checkpoint and goes on with its samples, and the learning rate
falls.
"""

import json
from pathlib import Path

from caduceus.config import Config, changes
from caduceus.errors import UserError
from caduceus.patience import is_file
from caduceus.run.checkpoints import MARKER, Checkpoint
from caduceus.run.directory import OPTIMIZER_STATE

FREE = ("train.steps", "train.schedule", "train.decay_steps", "train.decay_from", "train.min_lr")
"""Keys in which a branch may differ from the run that it leaves."""


def branch_point(config: Config) -> Checkpoint:
    """The checkpoint that `train.decay_from` names.

    Raises `UserError` where it is not a checkpoint or is damaged, where the learning rate is not at its highest value
    there, or where its run saw other samples or computed other numbers than this configuration would.
    """
    path = Path(str(config.train.decay_from))
    step = path.name.removeprefix("step-")
    if path.is_symlink() or not step.isdigit():  # at the next start `latest` may be another checkpoint
        raise _refusal(path, "is not the name of a checkpoint; give one such as RUN/checkpoints/step-00001000")
    if not is_file(path / MARKER):
        raise _refusal(path, "is not a complete checkpoint; give one such as RUN/checkpoints/step-00001000")
    checkpoint = Checkpoint(path, int(step))
    former = checkpoint.config()
    if former is None:
        raise _refusal(
            path, "does not hold a configuration that this version can read; give a checkpoint of this version"
        )
    if damage := checkpoint.damage():
        raise _refusal(path, f"is damaged: {damage}; give another checkpoint")
    _refuse_other_run(config, former, path)
    _refuse_other_height(config, former, checkpoint)
    return checkpoint


def _refuse_other_run(config: Config, former: Config, path: Path) -> None:
    for change in changes(former, config):
        name = change.key.name
        may_change = change.key.fixes == "numbers" and change.key.section != "model" and name not in OPTIMIZER_STATE
        if name in FREE or (may_change and name in config.run.allow_change):
            continue
        way_on = "give the same"
        if may_change:
            way_on += f", or go on with the change by run.allow_change=[{change.key.name}]"
        raise _refusal(path, f"belongs to a run with {change.key.name}={change.before}, not {change.now}; {way_on}")


def _refuse_other_height(config: Config, former: Config, checkpoint: Checkpoint) -> None:
    progress = json.loads((checkpoint.path / "progress.json").read_text())
    step, start = checkpoint.step, progress.get("decay_start")
    if former.train.schedule not in ("wsd", "constant"):
        raise _refusal(
            checkpoint.path,
            f"belongs to a run with train.schedule={former.train.schedule}, whose learning rate falls all the time; "
            "give one of a run under wsd or constant",
        )
    if step < (progress["warmup_steps"] or 0):
        raise _refusal(checkpoint.path, f"is within the warm-up of {progress['warmup_steps']} steps; give a later one")
    if start is not None and step > start:
        raise _refusal(checkpoint.path, f"is within the decay, which began after step {start}; give an earlier one")
    latest = config.train.steps - (config.train.decay_steps or 1)
    if step > latest:
        raise UserError(
            f"train.steps: the decay would begin after step {latest}, but the checkpoint of train.decay_from has made "
            f"{step}; give more steps"
        )


def _refusal(path: Path, what: str) -> UserError:
    return UserError(f"train.decay_from: {path} {what}")
