"""python -m caduceus.evaluate heldout (--run RUN | --export DIR --config FILE) [--split valid] [key.path=value …]
python -m caduceus.evaluate embed|variants --model DIR --input FILE --out FILE [--help for more]
"""

import argparse
import json
import logging
import warnings

from caduceus.arguments import Parser
from caduceus.config import load_config
from caduceus.data.format import SPLITS
from caduceus.errors import UserError, run_command
from caduceus.evaluate.commands import add_embed, add_finetune, add_predict, add_suite, add_variants

_START = """
Says what a trained model is worth, and uses it. To begin, give it a run:

  {caduceus-evaluate} heldout --run runs/ps-1k  # loss on held-out sequences, per species
  {caduceus-evaluate} embed --model runs/ps-1k --input genes.fa --out genes.npz  # a vector for each sequence
  {caduceus-evaluate} variants --model runs/ps-1k --input my.vcf --genome genome.fa --out scored.vcf  # their effects
  {caduceus-evaluate} finetune --model runs/ps-1k --train train.csv --test test.csv --out tuned  # sequence,label
  {caduceus-evaluate} heldout --run runs/ps-1k data.path=shards/yeast  # the same on other shards
  {caduceus-evaluate} --help  # what else it can do
"""


def main() -> int:
    """Parse the command line and run the verb."""
    parser = Parser(called="caduceus-evaluate", start=_START, description="Use a trained model; what it is worth.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="VERB")
    heldout = commands.add_parser("heldout", help="loss on held-out sequences, per species, in nats per labelled base")
    source = heldout.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--run", metavar="RUN", help="a run directory (its newest checkpoint), or one of its checkpoints"
    )
    source.add_argument("--export", metavar="DIR", help="a published checkpoint, such as caduceus.hub exports")
    heldout.add_argument("--config", metavar="FILE", help="data and masks; default the run's own config.yaml")
    heldout.add_argument("--split", choices=SPLITS, default="valid")
    heldout.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that win over the file's")
    heldout.set_defaults(handler=_heldout)
    add_embed(commands)
    add_variants(commands)
    add_finetune(commands)
    add_predict(commands)
    add_suite(commands)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
    arguments.handler(arguments)
    return 0


def _heldout(arguments: argparse.Namespace) -> None:
    from caduceus.data.loader import build_validation
    from caduceus.distributed.ranks import Ranks, choose_device
    from caduceus.evaluate.heldout import held_out_loss
    from caduceus.hub import load
    from caduceus.hub.folders import run_of
    from caduceus.ops.backends import check_backend

    if arguments.config is None and arguments.run is None:
        raise UserError(
            "--config: an export does not say which data to use; name a configuration, such as RUN/config.yaml"
        )
    config = load_config(arguments.config or run_of(arguments.run).config_path, arguments.overrides)
    device = choose_device(config.run.device)
    model = load(arguments.run or arguments.export)
    config.model = model.config  # decides which strands a sample may show
    dtype = next(model.parameters()).dtype
    check_backend(model.backend, device, dtype, config.model)
    batches = build_validation(config, arguments.split, device=device)
    mirror = None if config.data.objective == "next_base" else Ranks(0, 1, 1, device).mirrored
    told = held_out_loss(model.to(device), batches, device, config.train.precision, mirror=mirror)
    print(json.dumps(told, indent=1))


def command() -> None:
    """The command line."""
    run_command(main)


if __name__ == "__main__":
    command()
