"""python launch/slurm.py --nodes 8 [--config FILE] [--cluster PRESET] [--dry-run] … [key.path=value …]

Starts a training run as a job: on a SLURM cluster, on this machine (--cluster local) or in this process (--cluster
debug). Starting the same command again goes on where the run stopped.
"""

import argparse
import sys
from pathlib import Path

from omegaconf import OmegaConf

from caduceus.arguments import Parser, PresetAction
from caduceus.config import Config, WandbConfig, config_to_dict, has_dial, load_config, stages_of
from caduceus.errors import UserError, run_command
from caduceus.run.directory import RunDirectory
from caduceus.train.dial import dial_table
from caduceus.train.estimate import estimate
from launch.check import check
from launch.job import train
from launch.local import run_here
from launch.logs import log_path
from launch.preparation import prepared
from launch.refusals import complaints, refuse_bad_request, refuse_impossible_layout, refuse_run_in_use
from launch.request import JobRequest, add_request_options, requested_job
from launch.simulation import print_simulation
from launch.submission import note_unused_settings, run_executor, submit
from launch.sweep import run_sweep
from launch.terminal import runs_command

DEFAULT_CONFIG = "ps-131k"
_START = """
Starts a training run as a job that takes care of itself: it saves before its time is up, and then goes on. To begin:

  {caduceus-launch} --dry-run --config ps-1k data.path=shards/yeast --nodes 1 --partition gpu --account my-lab
  {caduceus-launch} --config ps-1k data.path=shards/yeast --cluster local --tasks-per-node 2

The first command prints the batch script and the configuration, and without --dry-run submits them; the second runs
here.

  {caduceus-launch} --check --nodes 2 --partition gpu  # what is wrong with the nodes, before a run finds out
  {caduceus-launch} --config list  # the presets of runs
  {caduceus-launch} --help  # everything that a job can ask for
  {caduceus-runs} list  # the runs of this folder
"""


def main() -> int:
    """Check the request, then submit it or, with --dry-run, print it. Returns the exit status."""
    arguments = parse_arguments()
    request = requested_job(arguments)
    if arguments.check:
        config = load_config(arguments.config, arguments.overrides)
        device = config.run.device if config.run.device != "auto" or request.gpus_per_node else "cpu"
        return check(request, Path(config.run.dir).parent, device)
    if arguments.sweep:
        return run_sweep(arguments.config, arguments.overrides, arguments.sweep, request, arguments.dry_run)
    config = load_config(arguments.config, arguments.overrides)
    if request.gpus_per_node and has_dial(arguments.config, arguments.overrides):
        print(dial_table(config, request.world), flush=True)
    if arguments.simulate:
        refuse_impossible_layout(config, request)
        print_simulation(config, request)
        return 0
    if arguments.dry_run:
        refuse_impossible_layout(config, request)
        show(config, request)
        return 0
    return check_and_start(config, request)


def check_and_start(config: Config, request: JobRequest) -> int:
    """Start a run, or go on with it, unless the checks find a mistake. Returns the exit status."""
    refuse_bad_request(config, request)
    path = Path(config.run.dir)
    for line in described_estimates(config, request):
        print(f"estimate:      {line}")
    print(f"run directory: {path}", flush=True)
    if request.executor == "debug":
        refuse_run_in_use(RunDirectory(path))
        RunDirectory(path).stop_path.unlink(missing_ok=True)
        return train(config)
    with prepared([config], path) as [run]:
        if request.executor == "local":
            return run_here(request, run)
        jobs = submit(request, run, config.run.name)
    print(f"job:           {' '.join(jobs)}\nlog:           {log_path(run.logs_path, jobs[0])}")
    print(f"W&B:           {wandb_place(config.wandb)}")
    print(f"next:          {runs_command('status', run.path)}   (or logs -f, stop, cancel, resume)")
    return 0


def parse_arguments() -> argparse.Namespace:
    """The parsed command line; options of the request that were not given are None."""
    parser = Parser(
        called="caduceus-launch",
        start=_START,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        default=DEFAULT_CONFIG,
        action=PresetAction,
        kind="pretrain",
        metavar="NAME|FILE",
        help=f"what to train: a preset, or a YAML file; list shows the presets ({DEFAULT_CONFIG})",
    )
    parser.add_argument("--dry-run", action="store_true", help="print batch script and configuration, submit nothing")
    simulate = "with --dry-run: print what each rank would do, and a model's times on 1 to --nodes nodes of H100"
    parser.add_argument("--simulate", action="store_true", help=simulate)
    parser.add_argument("--check", action="store_true", help="check the nodes that a job would get, and train nothing")
    values = "start a run for each combination of these values, as a job array; a key with one value has it in all runs"
    parser.add_argument("--sweep", nargs="+", metavar="KEY=V1,V2,…", help=values)
    add_request_options(parser, default="slurm")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help="values that override those of the configuration"
    )
    arguments = parser.parse_intermixed_args()
    if arguments.simulate and not arguments.dry_run:
        raise UserError("--simulate: give it with --dry-run, as it submits nothing")
    if arguments.simulate and arguments.sweep:
        raise UserError("--simulate: shows one run, not a --sweep; give the values of one as key.path=value")
    return arguments


def show(config: Config, request: JobRequest) -> None:
    """Print the estimate, the batch script and the resolved configuration; on stderr, what would be refused here."""
    note_unused_settings()
    for line in described_estimates(config, request):
        print(f"# estimate: {line}")
    if request.executor == "slurm":
        print(run_executor(request, Path(config.run.dir).absolute(), config.run.name).script())
    print(f"# {Path(config.run.dir) / 'config.yaml'}")
    print(OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config))), end="", flush=True)
    for complaint in complaints(config, request):
        print(f"would be refused: {complaint}", file=sys.stderr)


def described_estimates(config: Config, request: JobRequest) -> list[str]:
    """The estimate of a run, or of each of its stages, one line each."""
    gpus, lines = request.gpus_per_node > 0, []
    for stage in stages_of(config):
        found = estimate(stage.config, request.world, gpus, request.processes_per_node)
        steps = stage.config.train.steps
        hours = f", {found.step_seconds * steps / 3600:.2g} h" if gpus else ""
        of_stage = f"stage {stage.number}, {steps:,} steps{hours}: " if config.train.stages else ""
        lines.append(of_stage + found.describe(gpus))
    return lines


def wandb_place(wandb: WandbConfig) -> str:
    """Where the run can be seen in W&B, as far as this is known before it starts."""
    if wandb.mode in ("offline", "disabled"):
        return wandb.mode
    project = "/".join(filter(None, [wandb.entity, wandb.project or "caduceus"]))
    return f"project {project}; the log has the link of the run"


def command() -> None:
    """The command line."""
    run_command(main)


if __name__ == "__main__":
    command()
