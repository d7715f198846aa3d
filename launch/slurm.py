"""python launch/slurm.py --nodes 8 [--config FILE] [--cluster PRESET] [--dry-run] … [key.path=value …]

Starts a training run as a job: on a SLURM cluster, on this machine (--cluster local) or in this process (--cluster
debug). Starting the same command again goes on where the run stopped.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from caduceus.config import Config, config_to_dict, load_config
from caduceus.errors import UserError, run_command
from caduceus.run_directory import RunDirectory
from launch.checks import complaints, refuse_impossible_layout
from launch.cluster import Cluster, load_cluster
from launch.job import train_from
from launch.plan import plan
from launch.submission import REPOSITORY, batch_script, run_here, submit

DEFAULT_CONFIG = REPOSITORY / "configs" / "pretrain" / "ps-131k.yaml"
COUNTS = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task")
TEXTS = ("mem", "time", "partition", "account", "qos", "constraint", "exclude", "reservation", "python")
LISTS = {"setup": "LINE", "srun": "OPTION"}
PAIRS = {"sbatch": "KEY=VALUE", "env": "NAME=VALUE"}


def main() -> int:
    """Check the request, then submit it or, with --dry-run, show it; returns the exit status."""
    arguments = parse_arguments()
    cluster = load_cluster(arguments.cluster, cluster_options(arguments))
    config = load_config(arguments.config, arguments.overrides)
    refuse_impossible_layout(config, cluster)
    if arguments.dry_run:
        show(config, cluster)
        return 0
    if found := complaints(config, cluster):
        raise UserError(found[0])
    run = RunDirectory.create_or_resume(config)
    run.release()
    print(f"plan:          {described_plan(config, cluster)}\nrun directory: {run.path}", flush=True)
    if cluster.executor == "debug":
        return train_from(str(run.path))
    if cluster.executor == "local":
        return run_here(cluster, run)
    submit(config, cluster, run)
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line; what was not given of the request is None."""
    parser = argparse.ArgumentParser(
        prog="python launch/slurm.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, metavar="FILE", help="what to train")
    presets = "slurm, local, debug or another of configs/cluster/, or a YAML file (default: slurm)"
    parser.add_argument("--cluster", default="slurm", metavar="PRESET", help=presets)
    parser.add_argument("--dry-run", action="store_true", help="print batch script and configuration, submit nothing")
    request = parser.add_argument_group("the request", "Each option wins over the preset's key of the same name.")
    for name in COUNTS:
        request.add_argument(_option(name), type=int, metavar="N")
    for name in TEXTS:
        request.add_argument(_option(name), metavar=name.upper())
    for name, what in (LISTS | PAIRS).items():
        request.add_argument(_option(name), action="append", metavar=what, help="may be given several times")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that win over the config's")
    return parser.parse_intermixed_args()


def cluster_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that were given, as keys of `Cluster`."""
    given = {name: getattr(arguments, name) for name in (*COUNTS, *TEXTS, *LISTS, *PAIRS)}
    given = {name: value for name, value in given.items() if value is not None}
    return {name: dict(_pairs(name, value)) if name in PAIRS else value for name, value in given.items()}


def show(config: Config, cluster: Cluster) -> None:
    """Print plan, batch script and resolved configuration; on stderr, what would be refused here."""
    print(f"# plan: {described_plan(config, cluster)}")
    if cluster.executor == "slurm":
        print(batch_script(config, cluster))
    print(f"# {Path(config.run.dir) / 'config.yaml'}")
    print(OmegaConf.to_yaml(OmegaConf.create(config_to_dict(config))), end="", flush=True)
    for complaint in complaints(config, cluster):
        print(f"would be refused: {complaint}", file=sys.stderr)


def described_plan(config: Config, cluster: Cluster) -> str:
    return plan(config, cluster.world).describe(gpus=cluster.gpus_per_node > 0)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _pairs(name: str, texts: list[str]) -> list[tuple[str, Any]]:
    pairs = []
    for text in texts:
        key, equals, value = text.partition("=")
        if not key or (name == "env" and not equals):
            raise UserError(f"--{name} {text}: expected {PAIRS[name]}")
        pairs.append((key.lstrip("-"), value if equals else True))
    return pairs


if __name__ == "__main__":
    run_command(main)
