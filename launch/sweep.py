"""Starts a run for each combination of values of some keys: one job array, with a run directory each."""

import re
from itertools import product
from pathlib import Path

from caduceus.config import Config, load_config
from caduceus.errors import UserError
from launch.local import run_here
from launch.preparation import prepared
from launch.refusals import refuse_bad_request, refuse_impossible_layout
from launch.request import JobRequest
from launch.submission import run_executor, submit_array
from launch.terminal import runs_command

_COMMA = re.compile(r",(?![^\[]*\])")
"""A comma that is not inside a list such as train.betas=[0.9,0.95]."""


def run_sweep(path: Path, overrides: list[str], sweep: list[str], request: JobRequest, dry_run: bool) -> int:
    """Start all runs of a sweep; on this machine one after the other. Returns the exit status."""
    folder, configs = sweep_configs(path, overrides, sweep)
    if request.executor == "debug" or request.chain > 1:
        raise UserError("--sweep: goes with SLURM or --cluster local, not with debug or --chain")
    for config in configs:
        (refuse_impossible_layout if dry_run else refuse_bad_request)(config, request)
    if dry_run:
        print("\n".join(["# runs:", *(f"#   {config.run.dir}" for config in configs)]))
        if request.executor == "slurm":
            print(run_executor(request, folder.absolute(), folder.name, array=True).script())
        return 0
    print(f"sweep:         {len(configs)} runs in {folder}", flush=True)
    statuses = [0]
    with prepared(configs, folder) as runs:
        if request.executor == "slurm":
            jobs = submit_array(request, folder, runs, folder.name)
            print(f"jobs:          {' '.join(jobs)}")
        else:
            statuses = [run_here(request, run) for run in runs]
    print(f"table:         {runs_command('list', folder)}")
    return max(statuses)


def sweep_configs(path: Path, overrides: list[str], sweep: list[str]) -> tuple[Path, list[Config]]:
    """The sweep's folder, and the configuration of each run, which is named after its varying values.

    A key with one value has it in all runs, as if it were given without --sweep.
    """
    axes, fixed = [], list(overrides)
    for text in sweep:
        key, equals, listed = text.partition("=")
        values = _COMMA.split(listed)
        if not key or not equals or not all(values):
            raise UserError(f"--sweep {text}: expected KEY=VALUE,VALUE,…, such as train.lr=1e-3,8e-3")
        if len(values) == 1:
            fixed.append(text)
        elif key in ("run.dir", "run.name"):
            raise UserError(f"--sweep {text}: runs are named after their other keys; give {key} only one value")
        else:
            axes.append([f"{key}={value}" for value in values])
    if not axes:
        raise UserError("--sweep: no key has several values; give some, such as train.lr=1e-3,8e-3")
    base = load_config(path, fixed)
    folder = Path(f"{base.run.dir}-sweep")
    configs = []
    for point in product(*axes):
        config = load_config(path, [*fixed, *point])
        name = ",".join(setting.split("=")[0].split(".")[-1] + "=" + setting.split("=")[1] for setting in point)
        config.run.dir = str(folder / name.replace("/", "_"))
        config.run.name = f"{base.run.name}-{name}"
        config.wandb.group = base.wandb.group or folder.name
        configs.append(config)
    if len({config.run.dir for config in configs}) < len(configs):
        raise UserError("--sweep: two runs would have the same name; give each value and key once")
    return folder, configs
