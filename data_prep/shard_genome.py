"""Command line: genomes -> WebDataset shards with index, tables and manifest (format 2), complete or not at all.

python data_prep/shard_genome.py --fasta hg38.fa.gz --species hg38 --out shards
python data_prep/shard_genome.py --verify shards
"""

import argparse
from collections.abc import Sequence
from typing import Any

from caduceus.arguments import Parser
from caduceus.errors import UserError, run_command
from data_prep.argument_types import count, genomes_file, local_path
from data_prep.check.merge import merge
from data_prep.check.rebuild import rebuild_index
from data_prep.check.verify import verify
from data_prep.genome.reader import FORMATS
from data_prep.plan.options import CONTIGS, INTERVAL_MODES, STRANDS, TAILS, PlanOptions, option_name
from data_prep.plan.species import SpeciesRequest
from data_prep.source.registry import resolve_genome
from data_prep.source.species_file import fetch_files, genome_file, read_species_file, request_for_genome
from data_prep.workers import available_cores
from data_prep.write.sharding import make_dataset
from data_prep.write.summary import print_summary

_START = """
Cuts genomes into windows and writes them as shards to train on. To begin:

  {caduceus-shard} --genome sacCer3 --out shards/yeast
  {caduceus-shard} --fasta my.fa.gz --species mine --valid-contigs chr1 --out shards/mine
  {caduceus-shard} --verify shards/mine

The first command downloads a genome of the registry, the second takes your own, the third checks what was written. All
options:

  {caduceus-shard} --help

Then train on the shards: {caduceus-train} --config ps-1k data.path=shards/yeast
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    args = build_parser().parse_args(arguments)
    refuse_unused(args)
    if args.verify is not None:
        return verify(args.verify, args.workers)
    if args.rebuild_index is not None:
        print_summary(rebuild_index(args.rebuild_index), args.rebuild_index)
        return 0
    if args.out is None:
        raise UserError("--out is missing: the directory that the shards go to")
    if args.merge is not None:
        manifest = merge(args.merge, args.out, args.add)
    else:
        manifest = make_dataset(requests_from(args), args.out, args.workers, args.add)
    print_summary(manifest, args.out)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser. Options of the plan have no defaults here, as `PlanOptions` has them."""
    parser = Parser(
        called="caduceus-shard",
        start=_START,
        description="Cut genomes into windows and write them as WebDataset shards.",
        epilog="A command that was stopped goes on when it is given again. Files may be http, https, ftp or "
        "s3 addresses; they are downloaded once, into the cache directory.",
    )
    source = parser.add_argument_group("what to do (one of)")
    kind = source.add_mutually_exclusive_group(required=True)
    kind.add_argument("--fasta", metavar="FILE|URL", help=f"genome: {FORMATS}; needs --species")
    kind.add_argument("--genome", metavar="NAME", help="a genome of configs/genome/, downloaded if need be")
    kind.add_argument("--genomes", type=genomes_file, metavar="NAME|YAML", help="several species and their options")
    kind.add_argument("--verify", type=local_path, metavar="DIR", help="check a dataset byte for byte")
    kind.add_argument("--merge", type=local_path, nargs="+", metavar="DIR", help="merge datasets into --out")
    kind.add_argument(
        "--rebuild-index", type=local_path, metavar="DIR", help="make the indexes of a dataset's tars anew"
    )
    parser.add_argument("--species", metavar="NAME", help="name of the species, and of its folder")
    parser.add_argument("--assembly", metavar="A", help="name of the assembly")
    parser.add_argument("--out", type=local_path, metavar="DIR", help="directory of the dataset")
    parser.add_argument("--add", action="store_true", help="add to a dataset of other species in --out")
    parser.add_argument("--workers", type=count, default=available_cores(), metavar="N", help="processes (%(default)s)")
    parser.add_argument(
        "--cache-dir",
        type=local_path,
        metavar="DIR",
        help="where downloads and unpacked genomes are kept (~/.cache/caduceus/genomes)",
    )
    add_plan_options(parser.add_argument_group("plan (decides the bytes; same plan, same bytes)"))
    return parser


_VALUES = {
    "window": (int, "N", "longest window, in bases (1048576)"),
    "stride": (int, "N", "distance between window starts (the window)"),
    "min_window": (int, "N", "shortest window (1024, or --window if that is less)"),
    "cut_gaps": (int, "N", "runs of N of this length separate segments; with 0 none does (10000)"),
    "min_acgt": (float, "F", "smallest share of ACGT in a window (0.5)"),
    "include": (str, "RE", "use the contigs whose whole name matches, instead of --contigs"),
    "exclude": (str, "RE", "leave out the contigs whose whole name matches"),
    "aliases": (str, "FILE|URL", "table of contig names, or an NCBI assembly report"),
    "intervals": (str, "BED|URL", "regions to use, split by column 4 if there is one; 'registry': the published ones"),
    "around": (str, "GTF|URL", "use the genes of an annotation (GTF or GFF3), each with --flank bases on either side"),
    "flank": (int, "N", "bases on either side of a gene (2000)"),
    "split_block": (int, "N", "split contigs by hashed blocks of N bases"),
    "valid_fraction": (float, "F", "share of the blocks that are valid (0)"),
    "test_fraction": (float, "F", "share of the blocks that are test (0)"),
    "homology": (
        float,
        "F",
        "leave out of train what has this share of its k-mers in valid or test of any of the species, as 0.5 (off)",
    ),
    "shard_bytes": (str, "SIZE", "largest tar (256MB)"),
    "seed": (int, "N", "seed of the order of windows in shards, and of random strands (0)"),
}
_CHOICES = {
    "contigs": (
        CONTIGS,
        "auto: all but organelles, viruses, decoys, other versions and contigs that are not on a chromosome; an "
        "error where that leaves less than half of the bases (auto); primary: the same without the error; all: every "
        "contig",
    ),
    "strands": (STRANDS, "which strands are stored (both)"),
    "tail": (TAILS, "the end of a segment (short)"),
    "interval_mode": (
        INTERVAL_MODES,
        "a row of --intervals is cut into windows (tile), is a window (exact), or is extended to --window bases and "
        "moved inward at the end of its contig (extend); in the last two none may be longer than --window",
    ),
}
_LISTS = {
    "exclude_bed": ("BED|URL", "regions to leave out; 'registry': the genome's blacklist"),
    "valid_contigs": ("C", "contigs of the valid split"),
    "test_contigs": ("C", "contigs of the test split"),
}
_SWITCHES = {
    "allow_unknown_contigs": (
        "store_true",
        "pass over rows of tables about contigs, or places on them, that the genome does not hold",
    ),
    "forbid_leakage": (
        argparse.BooleanOptionalAction,
        "cut out of train what valid or test hold (except with --interval-mode extend)",
    ),
}


def add_plan_options(group: Any) -> None:
    """Add an option for each field of `PlanOptions`; an option that is not given is absent from the result."""

    def add(key: str, text: str, **more: Any) -> None:
        group.add_argument(option_name(key), help=text, default=argparse.SUPPRESS, **more)

    for key, (kind, metavar, text) in _VALUES.items():
        add(key, text, type=kind, metavar=metavar)
    for key, (choices, text) in _CHOICES.items():
        add(key, text, choices=choices)
    for key, (metavar, text) in _LISTS.items():
        add(key, text, nargs="+", metavar=metavar)
    for key, (action, text) in _SWITCHES.items():
        add(key, text, action=action)


def refuse_unused(args: argparse.Namespace) -> None:
    """Raise `UserError` for options that have no effect on the task."""
    used = {"verify": set(), "rebuild_index": set(), "merge": {"out", "add"}}
    task = next((name for name in used if getattr(args, name) is not None), None)
    if task is None:
        return
    for key, value in vars(args).items():
        given = key in PlanOptions.__dataclass_fields__ or value not in (None, False)
        if given and key not in used[task] | {task, "workers"}:
            raise UserError(f"{option_name(key)}: has no effect with {option_name(task)}; leave it out")


def requests_from(args: argparse.Namespace) -> list[SpeciesRequest]:
    """The species that the command line asks for."""
    given = {key: value for key, value in vars(args).items() if key in PlanOptions.__dataclass_fields__}
    if args.genomes is not None:
        if args.species or args.assembly:
            raise UserError("--species and --assembly go with --fasta or --genome; --genomes names its species itself")
        return read_species_file(args.genomes, given, args.cache_dir)
    if args.genome is not None:
        spec = resolve_genome(args.genome)
        return [request_for_genome(spec, given, name=args.species, assembly=args.assembly, cache_dir=args.cache_dir)]
    if not args.species:
        raise UserError("--species is missing: the name of the species, and of its folder in --out")
    options = fetch_files(PlanOptions.from_values(given), args.cache_dir)
    fasta = genome_file(args.fasta, args.cache_dir)
    return [SpeciesRequest(args.species, fasta, args.assembly or "", options, cache_dir=args.cache_dir)]


def command() -> None:
    """The command line."""
    run_command(main, interrupted="interrupted; run the same command again to go on")


if __name__ == "__main__":
    command()
