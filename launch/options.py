"""The options by which a command line asks for nodes, time and the rest."""

import argparse
from typing import Any

from caduceus.errors import UserError
from launch.cluster import Cluster, load_cluster

COUNTS = ("nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task", "chain")
TEXTS = ("mem", "time", "partition", "account", "qos", "constraint", "exclude", "reservation", "python")
LISTS = {"setup": "LINE", "srun": "OPTION"}
PAIRS = {"sbatch": "KEY=VALUE", "env": "NAME=VALUE"}


def add_request_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Add --cluster and an option per key of a preset; what was not given is None."""
    presets = f"slurm, local, debug or another of configs/cluster/, or a YAML file (default: {default})"
    parser.add_argument("--cluster", default=default, metavar="PRESET", help=presets)
    request = parser.add_argument_group("the request", "Each option wins over the preset's key of the same name.")
    for name in COUNTS:
        request.add_argument(_option(name), type=int, metavar="N")
    for name in TEXTS:
        request.add_argument(_option(name), metavar=name.upper())
    for name, what in (LISTS | PAIRS).items():
        request.add_argument(_option(name), action="append", metavar=what, help="may be given several times")


def requested_cluster(arguments: argparse.Namespace) -> Cluster:
    """The preset with the options that were given on top."""
    given = {name: getattr(arguments, name) for name in (*COUNTS, *TEXTS, *LISTS, *PAIRS)}
    given = {name: value for name, value in given.items() if value is not None}
    options = {name: dict(_pairs(name, value)) if name in PAIRS else value for name, value in given.items()}
    return load_cluster(arguments.cluster, options)


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
