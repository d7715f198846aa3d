"""python -m caduceus.evaluate heldout (--run RUN | --export DIR --config FILE) [--split valid] [key.path=value …]
python -m caduceus.evaluate embed|variants --model DIR --input FILE --out FILE [--help for more]
"""

import logging
import warnings

from caduceus.arguments import Parser
from caduceus.errors import run_command
from caduceus.evaluate.commands import add_verbs

_START = """
Says what a trained model is worth, and uses it. To begin, give it a run:

  {caduceus-evaluate} heldout --run runs/ps-1k  # loss on held-out sequences, per species
  {caduceus-evaluate} embed --model runs/ps-1k --input genes.fa --out genes.npz  # a vector for each sequence
  {caduceus-evaluate} variants --model runs/ps-1k --input my.vcf --genome genome.fa --out scored.vcf  # their effects
  {caduceus-evaluate} probe --model runs/ps-1k --train train.csv --test test.csv --out probe.json  # sequence,label
  {caduceus-evaluate} finetune --model runs/ps-1k --train train.csv --test test.csv --out tuned
  {caduceus-evaluate} heldout --run runs/ps-1k data.path=shards/yeast  # the same on other shards
  {caduceus-evaluate} --help  # what else it can do
"""


def main() -> int:
    """Parse the command line and run the verb."""
    parser = Parser(
        called="caduceus-evaluate", start=_START, description="Use a trained model, and measure how good it is."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="VERB")
    add_verbs(commands)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
    arguments.handler(arguments)
    return 0


def command() -> None:
    """The command line."""
    run_command(main)


if __name__ == "__main__":
    command()
