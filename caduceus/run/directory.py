"""A run directory: where everything of one run lies, and which of its checkpoints can be trusted. Imports no torch.

config.yaml          the configuration as asked for    resolved.yaml     what every `auto` became at the last start
allowed_commands.json                                  commands in it that its user allowed, where there are any
provenance.json      code, packages, hosts, fingerprints
metrics.jsonl        one JSON object per line          logs/  wandb/  report/  export/  windows/  profile/
events.jsonl         starts, checkpoints, rewinds and ends, of all starts
checkpoints/step-00001000/COMPLETE                     marker, written last: sizes and sha256 of the checkpoint's files
checkpoints/latest                                     link to the newest complete checkpoint
checkpoints/best  best.json                            link to that of `checkpoint.best`, and its step and value
checkpoints/damaged-step-00002000                      set aside by a start that found it damaged; counts for nothing
"""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from caduceus.config import Config, changes, load_config, save_config
from caduceus.errors import RetryError, UserError
from caduceus.files import dump_json, read_json, read_json_lines, sync, write_atomically
from caduceus.patience import exists, is_directory, is_file, listed, patient, patiently
from caduceus.run.checkpoints import MARKER, Checkpoint, write_marker
from caduceus.run.lock import Holder, RunLock
from caduceus.run.provenance import provenance
from caduceus.run.rows import cut_after, newest_rows

_STEPS = re.compile(r"^train:\n(?:  .*\n)*?  steps: (\d+)\n", re.MULTILINE)
_BEST = "best.json"
OPTIMIZER_STATE = ("train.optimizer", "train.lr_scale", "train.ema")
"""Keys that decide what a checkpoint holds of the optimizer's state."""

_log = logging.getLogger(__name__)


class RunDirectory:
    """Paths and state of a run. `create_or_resume` is for the process that trains, `open` for readers."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics_path = self.path / "metrics.jsonl"
        self.config_path = self.path / "config.yaml"
        self.resolved_path = self.path / "resolved.yaml"
        self.provenance_path = self.path / "provenance.json"
        self.checkpoints_path = self.path / "checkpoints"
        self.logs_path = self.path / "logs"
        self.stop_path = self.path / "STOP"
        self.save_path = self.path / "SAVE"
        self._lock = RunLock(self.path)

    @classmethod
    def open(cls, path: str | Path) -> "RunDirectory":
        """An existing run. Raises `UserError` where there is none."""
        run = cls(path)
        if not is_file(run.config_path):
            raise UserError(f"{path}: not a run directory (config.yaml is missing)")
        return run

    @classmethod
    def create_or_resume(cls, config: Config) -> "RunDirectory":
        """The run directory of `config`, locked for this process.

        Raises `RetryError` where another process trains in it, and `UserError` where its configuration differs in a key
        that decides the run's numbers, unless `run.allow_change` names that key.
        """
        assert config.run.dir is not None, "load_config gives a run its directory"
        run = cls(config.run.dir)
        with run.telling_of_disks():
            if is_file(run.config_path) or run.checkpoints():
                run._refuse_other_config(config)
            elif run._holds_something_else():
                raise UserError(
                    f"run.dir: {run.path} exists and holds something other than a run; choose another directory"
                )
            for directory in (run.checkpoints_path, run.logs_path):
                patiently(partial(directory.mkdir, parents=True, exist_ok=True))
            run._lock.take()
            if not is_file(run.config_path):
                save_config(config, run.config_path)
        return run

    @patient
    def _holds_something_else(self) -> bool:
        """Whether the directory holds files that are neither a run's nor a user's request that was left before the run
        began.
        """
        if not is_directory(self.path) or exists(self._lock.path):
            return False
        return any(path not in (self.stop_path, self.save_path) for path in listed(self.path))

    @contextlib.contextmanager
    def telling_of_disks(self) -> Iterator[None]:
        """A context in which the `OSError` of a disk that fails or is full becomes a `UserError`."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f"run.dir: {self.path} cannot be read or written ({error}); repair the disk or make room, and start "
                "the same command again, or choose another run.dir"
            ) from None

    def keep_config(self, config: Config) -> None:
        """Write `config` as the run's own. The process that trains calls this once it has loaded its checkpoint; the
        launcher calls it for a job.
        """
        save_config(config, self.config_path)

    @patient
    def config(self) -> Config:
        return load_config(self.config_path)

    @patient
    def steps(self) -> int:
        """`train.steps` of the run's configuration. Where a run wrote the file, nothing else of it is parsed."""
        found = _STEPS.search(self.config_path.read_text())
        return int(found[1]) if found else self.config().train.steps

    def release(self) -> None:
        """Let another process train in this directory."""
        self._lock.release()

    def is_in_use(self) -> bool:
        """Whether another process on this machine trains in this directory."""
        return self._lock.is_held_elsewhere()

    @property
    def file_clock_lead(self) -> float:
        """Seconds by which the times of files here are ahead of this machine's clock; 0 before this process trains
        here.
        """
        return self._lock.file_clock_lead

    def holder(self) -> Holder | None:
        """The process that trains in this directory, or trained in it last; None where that is not known."""
        return self._lock.holder()

    def shut_out_holder(self) -> None:
        """Free the directory for the next process, although the holder may still run where it cannot be reached.

        The holder completes no further checkpoint, and ends when it next asks whether it `is_taken_over`.
        """
        self._lock.shut_out_holder()

    def is_taken_over(self) -> bool:
        """Whether this process, which took the directory, has lost it to another one."""
        return self._lock.is_lost()

    def checkpoint_path(self, step: int) -> Path:
        return self.checkpoints_path / f"step-{step:08d}"

    @patient
    def checkpoints(self) -> list[Checkpoint]:
        """Checkpoints that have their marker, oldest first."""
        found = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for path in listed(self.checkpoints_path):
                step = path.name.removeprefix("step-")
                if path.name != step and step.isdigit() and is_file(path / MARKER):
                    found.append(Checkpoint(path, int(step)))
        return sorted(found, key=lambda checkpoint: checkpoint.step)

    def newest_valid_checkpoint(self) -> Checkpoint | None:
        """The newest checkpoint whose files are whole; None where there is none. Damaged ones are logged and passed
        over.
        """
        for checkpoint in reversed(self.checkpoints()):
            damage = checkpoint.damage()
            if damage is None:
                return checkpoint
            _log.warning("%s: damaged checkpoint passed over: %s", checkpoint.path, damage)
        return None

    @patient
    def set_aside_damaged_checkpoints(self) -> Checkpoint | None:
        """Rename the damaged checkpoints that are newer than the newest valid one, and return that: the run goes on
        from it.

        Under their own names they would count as the newest ones to keep, and valid ones would be removed instead.
        """
        newest, found = self.newest_valid_checkpoint(), self.checkpoints()
        if found and newest is None:
            _log.warning("%s: no checkpoint is whole: the run starts again from its beginning", self.checkpoints_path)
        for checkpoint in found:
            if newest is None or checkpoint.step > newest.step:
                aside = checkpoint.path.with_name(f"damaged-{checkpoint.path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                checkpoint.path.rename(aside)
                _log.warning("%s: set aside as %s", checkpoint.path, aside.name)
        if newest is None:
            (self.checkpoints_path / "latest").unlink(missing_ok=True)
        else:
            self._link("latest", newest.path)
        return newest

    def complete_checkpoint(self, written: Path, step: int, facts: dict[str, Any]) -> Checkpoint:
        """Turn a fully written directory into the checkpoint of `step`: marker, rename, `latest`.

        Raises `UserError` where another process has taken over the run directory.
        """
        write_marker(written, step, facts)
        if self.is_taken_over():
            raise RetryError(f"run.dir: {self.path} was taken over by another process")
        final = self.checkpoint_path(step)
        with contextlib.suppress(FileNotFoundError):
            self._remove(final)
        patiently(partial(written.rename, final))
        self._link("latest", final)
        sync(self.checkpoints_path)
        return Checkpoint(final, step)

    def best(self) -> dict[str, Any] | None:
        """The `step` of the best checkpoint, with `metric`, `is` and `value`; None where there is none."""
        best = read_json(self.checkpoints_path / _BEST)
        try:
            return best if is_file(self.checkpoint_path(best["step"]) / MARKER) else None
        except (ValueError, KeyError, TypeError):
            return None

    def keep_best(self, step: int, facts: dict[str, Any]) -> None:
        """Make the complete checkpoint of `step` the best one; `facts`: `metric`, `is` and `value`, as `best` returns
        them.
        """
        write_atomically(self.checkpoints_path / _BEST, dump_json({"step": step, **facts}))
        self._link("best", self.checkpoint_path(step))

    @patient
    def remove_old_checkpoints(self, keep: int, keep_every: int = 0, keep_steps: Collection[int] = ()) -> None:
        """Remove all but the newest `keep` checkpoints (0 keeps all), and what killed saves left behind.

        Checkpoints whose step is a multiple of `keep_every` (0: no such rule), those of `keep_steps` and the best one
        are never removed. Of the damaged ones that were set aside, the newest `keep` stay.
        """
        kept = {*keep_steps, (self.best() or {}).get("step")}
        for leftover in [*listed(self.checkpoints_path, ".writing-*"), *listed(self.checkpoints_path, ".old-*")]:
            shutil.rmtree(leftover)
        for checkpoint in self.checkpoints()[:-keep] if keep else []:
            if checkpoint.step not in kept and (not keep_every or checkpoint.step % keep_every):
                self._remove(checkpoint.path)
        for damaged in listed(self.checkpoints_path, "damaged-step-*")[:-keep] if keep else []:
            shutil.rmtree(damaged)
            _log.warning("%s: removed, as checkpoint.keep=%d newer damaged ones are kept", damaged, keep)

    @patient
    def _link(self, name: str, checkpoint: Path) -> None:
        link = self.checkpoints_path / f".{name}.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(checkpoint.name)
        link.replace(self.checkpoints_path / name)

    def _remove(self, checkpoint: Path) -> None:
        # It is renamed first: otherwise a kill would leave a part of a checkpoint under its own name.
        doomed = checkpoint.with_name(f".old-{checkpoint.name}")
        checkpoint.rename(doomed)
        shutil.rmtree(doomed)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl; a line cut off by a kill or a full disk is left out."""
        return read_json_lines(self.metrics_path)

    @patient
    def newest_metrics(self, key: str, count: int = 1, end: int | None = None) -> list[dict[str, Any]]:
        """The newest rows of metrics.jsonl that have `key`, oldest first; only the end of the file is searched.

        With `end`, only rows that end at this byte or before it count.
        """
        return newest_rows(self.metrics_path, key, count, end)

    @patient
    def truncate_metrics(self, step: int) -> None:
        """Drop the rows after `step`, which the run is about to make again."""
        cut_after(self.metrics_path, step)

    def write_provenance(self, facts: dict[str, Any]) -> None:
        """Append this start to provenance.json: code, packages, host and the given facts."""
        found = self._provenance()
        starts = [*found.get("starts", []), {**provenance(), **facts}]
        write_atomically(self.provenance_path, dump_json({**found, "starts": starts}))

    def note_stage(self, number: int, facts: dict[str, Any]) -> None:
        """Record in provenance.json that a stage of `train.stages` begins or goes on."""
        found = self._provenance()
        stages = {**found.get("stages", {}), str(number): facts}
        write_atomically(self.provenance_path, dump_json({**found, "stages": stages}))

    def starts(self) -> list[dict[str, Any]]:
        """The entries of provenance.json, one for each start of training."""
        return self._provenance().get("starts", [])

    def stages(self) -> dict[str, dict[str, Any]]:
        """The facts of provenance.json about each stage that has begun, by its number."""
        return self._provenance().get("stages", {})

    def _provenance(self) -> dict[str, Any]:
        found = read_json(self.provenance_path)
        return found if isinstance(found, dict) else {}

    def former_config(self) -> Config:
        """The configuration that made the run's numbers so far.

        It is that of the newest whole checkpoint, as config.yaml may have been edited since; before the first
        checkpoint it is config.yaml.
        """
        for checkpoint in reversed(self.checkpoints()):
            if not checkpoint.damage(contents=False) and (found := checkpoint.config()) is not None:
                return found
        return self.config()

    def _refuse_other_config(self, config: Config) -> None:
        for change in changes(self.former_config(), config):
            key, asked = change.key, change.key.name in config.run.allow_change
            counts_samples = key.fixes == "order" and bool(self.checkpoints())
            if key.name in OPTIMIZER_STATE and self.checkpoints():
                asked = False
            if asked and not counts_samples:
                continue
            if asked:
                way_on = f"; its checkpoints count samples in the order that {key.name} fixes: choose another run.dir"
            elif counts_samples or ((key.section == "model" or key.name in OPTIMIZER_STATE) and self.checkpoints()):
                way_on = "; choose another run.dir"
            else:
                way_on = f"; choose another run.dir, or go on with the change by run.allow_change=[{key.name}]"
            values = f"{key.name}={_shown(change.before)}, not {_shown(change.now)}"
            raise UserError(f"run.dir: {self.path} holds a run with {values}{way_on}{self._newest_if_damaged()}")

    def _newest_if_damaged(self) -> str:
        """What a refusal adds where the newest checkpoint is damaged and an older one was compared."""
        newest = self.checkpoints()[-1:]
        damage = newest[0].damage(contents=False) if newest else None
        return f" (compared with an older one, as {newest[0].path.name} is damaged: {damage})" if damage else ""


def _shown(value: Any) -> str:
    """A value as it is written on the command line."""
    return "null" if value is None else f"{value}"
