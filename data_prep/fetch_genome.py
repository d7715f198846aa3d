"""Command line: downloads a genome, with resuming, checksum and progress.

python data_prep/fetch_genome.py NAME|URL --out DIR
"""

from caduceus.arguments import Parser
from caduceus.errors import run_command
from data_prep.argument_types import is_url, local_path
from data_prep.source.download import fetch, fetch_genome, verify_file
from data_prep.source.registry import registry_names, resolve_genome

_START = """ Downloads a genome; a download that was stopped goes on. To begin:

  {caduceus-fetch} sacCer3 --out genomes
  {caduceus-fetch} --help

The second command lists all genomes of the registry. {caduceus-shard} makes shards of the file, to train on.
"""


def main() -> int:
    parser = Parser(called="caduceus-fetch", start=_START, description="Download a genome into a folder.")
    parser.add_argument("genome", metavar="NAME|URL", help=f"one of {', '.join(registry_names())}, or an address")
    parser.add_argument("--out", type=local_path, required=True, metavar="DIR", help="folder that takes the file")
    parser.add_argument("--sha256", help="expected sha256 of the file")
    parser.add_argument("--md5", help="expected md5 of the file")
    options = parser.parse_args()
    if is_url(options.genome):
        path = fetch(options.genome, options.out, options.sha256, options.md5)
    else:
        genome = resolve_genome(options.genome)
        path = fetch_genome(genome, options.out)
        verify_file(path, options.sha256, options.md5)
    print(path)
    return 0


def command() -> None:
    """The command line."""
    run_command(main, interrupted="interrupted; run the same command again to go on")


if __name__ == "__main__":
    command()
