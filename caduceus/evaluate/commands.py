"""The options of each verb, and what it does with them. Imports no torch before a verb runs."""

import argparse
from dataclasses import fields
from typing import Any


def add_embed(commands: Any) -> None:
    """The verb `embed`."""
    parser = commands.add_parser("embed", help="embeddings of sequences, one vector each or one for each base")
    _add_model(parser)
    parser.add_argument("--input", required=True, metavar="FILE", help="FASTA, 2bit, BED, VCF, CSV, TSV or parquet")
    parser.add_argument("--genome", metavar="FASTA", help="the genome that a BED or VCF is about")
    parser.add_argument("--aliases", metavar="FILE", help="a table of names of contigs")
    parser.add_argument("--window", type=int, metavar="N", help="bases about each BED row or variant")
    parser.add_argument("--column", default="sequence", help="of the sequences in a table; default sequence")
    parser.add_argument("--pool", default="mean", metavar="mean|max|centre|base|N", help="base: a vector for each base")
    parser.add_argument("--layer", type=int, default=-1, help="0 the embedding … n_layer or -1 the final norm")
    parser.add_argument("--strands", default="average", metavar="average|concatenate|forward")
    parser.add_argument("--piece", type=int, default=65_536, help="longest sequence in one pass; default 65536")
    parser.add_argument("--batch-bases", type=int, default=32_768, help="bases of a batch; default 32768")
    parser.add_argument("--out", required=True, metavar="FILE", help=".npz or .parquet")
    parser.set_defaults(handler=_embed)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a run, one of its checkpoints, an export or a published folder"
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))


def _picked(arguments: argparse.Namespace, kind: type) -> Any:
    """The dataclass `kind` of the options that are named as its fields."""
    return kind(**{field.name: getattr(arguments, field.name) for field in fields(kind)})


def _embed(arguments: argparse.Namespace) -> None:
    from caduceus.evaluate.embed import EmbedOptions, embed_file
    from caduceus.evaluate.model import Runner
    from caduceus.evaluate.sequences import SequenceSource

    options = _picked(arguments, EmbedOptions)
    runner = Runner(arguments.model, arguments.device, arguments.precision)
    embed_file(runner, _picked(arguments, SequenceSource), arguments.out, options)
    print(f"{arguments.out}: written")
