"""python -m caduceus.train --config NAME|FILE [--show] [--quiet] [key.path=value …]"""

import argparse
import logging
import os
import signal
import warnings

from caduceus.arguments import Parser, PresetAction
from caduceus.config import SECTIONS, Config, has_dial, load_config
from caduceus.config.reference import about_section, annotated
from caduceus.errors import run_command
from caduceus.presets import preset_list
from caduceus.run.leaving import leaving
from caduceus.run.node import compiler_caches

_INTERRUPTED = "interrupted before a new checkpoint was made; the same command goes on from the newest one"

_START = """
Pre-trains a Caduceus on shards of genomes. To begin, make shards, then train on them:

  {caduceus-shard} --genome sacCer3 --out shards/yeast
  {caduceus-train} --config demo data.path=shards/yeast run.dir=runs/yeast  # small: minutes on two CPU cores
  {caduceus-train} --config ps-1k data.path=shards/yeast  # as published, for a GPU

  {caduceus-train} --config list  # the presets: published models, at 1 kb to 1 Mb
  {caduceus-train} --config ps-1k --show  # what a run would get, key by key, with words
  {caduceus-train} --help  # options, presets and sections of keys
"""


def main() -> int:
    """Parse the command line and train; returns the exit status."""
    arguments = _parser().parse_args()
    set_up_logging(quiet=arguments.quiet)
    config = load_config(arguments.config, arguments.overrides)
    dial = _table_of_dial(config, arguments)
    if arguments.show:
        print(dial + annotated(config), end="")
        return 0
    if dial and os.environ.get("RANK", "0") == "0":
        logging.getLogger(__name__).info("%s", dial.rstrip())
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os.environ.update({**compiler_caches(os.environ), **os.environ})
    from caduceus.train.trainer import train

    with leaving(_INTERRUPTED):
        status = train(config)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run has ended, and its status tells how
    return status


def set_up_logging(quiet: bool = False) -> None:
    """Print the messages of the run as plain lines on stderr; with `quiet` only warnings and errors."""
    logging.basicConfig(level=logging.WARNING if quiet else logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")


def _table_of_dial(config: Config, arguments: argparse.Namespace) -> str:
    """Lines with the keys that a dial decided, and the time and memory of such a run; empty without a dial."""
    if not has_dial(arguments.config, arguments.overrides):
        return ""
    from caduceus.train.dial import dial_table

    return dial_table(config, int(os.environ.get("WORLD_SIZE", 1))) + "\n"


def command() -> None:
    """The command line."""
    run_command(main, _INTERRUPTED)


def _parser() -> Parser:
    sections = "\n".join(f"  {f'{name}.':12} {about_section(name)}" for name in SECTIONS)
    parser = Parser(
        called="caduceus-train",
        start=_START,
        description="Pre-train Caduceus, on one process or, under torchrun, many.",
        epilog=f"presets:\n{preset_list('pretrain')}\n\nsections of keys (--show prints all their keys):\n{sections}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    parser.add_argument(
        "--config",
        required=True,
        action=PresetAction,
        kind="pretrain",
        metavar="NAME|FILE",
        help="a preset, or a YAML file; list shows the presets",
    )
    parser.add_argument("--show", action="store_true", help="print the configuration that results, and train nothing")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="values that override those of the file"
    )
    return parser


if __name__ == "__main__":
    command()
