"""The options of each verb, and what it does with them. Imports no torch before a verb runs."""

import argparse
from dataclasses import fields
from typing import Any

from caduceus.errors import UserError


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
    parser.add_argument("--batch-bases", type=int, metavar="N", help="bases of a batch; default as suits the device")
    parser.add_argument("--out", required=True, metavar="FILE", help=".npz or .parquet")
    parser.set_defaults(handler=_embed)


def add_variants(commands: Any) -> None:
    """The verb `variants`."""
    parser = commands.add_parser("variants", help="scores of variants: likelihoods, probabilities, embeddings")
    _add_model(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", metavar="FILE", help="VCF, or a CSV, TSV or parquet of chrom, pos, ref, alt")
    what.add_argument("--every-snv", metavar="BED", help="instead: all three substitutions of each place")
    parser.add_argument("--genome", metavar="FASTA", help="without it, rows of a table bring their sequence and start")
    parser.add_argument("--aliases", metavar="FILE", help="a table of names of contigs")
    parser.add_argument("--scores", nargs="+", default=["masked"], metavar="SCORE", help="masked, unmasked, embedding")
    parser.add_argument("--window", type=int, default=1024, help="bases that the model sees; default 1024")
    parser.add_argument("--strands", default="average", metavar="average|each|forward")
    parser.add_argument("--flank", type=int, default=5, help="bases beside an indel that score it; default 5")
    parser.add_argument("--ref-mismatch", default="refuse", metavar="refuse|skip|swap")
    parser.add_argument("--allow-unknown-contigs", action="store_true", help="leave out variants on other contigs")
    parser.add_argument("--batch-bases", type=int, metavar="N", help="bases of a batch; default as suits the device")
    parser.add_argument("--out", required=True, metavar="FILE", help=".vcf, .vcf.gz, .tsv, .csv or .parquet")
    parser.set_defaults(handler=_variants)


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


def _variants(arguments: argparse.Namespace) -> None:
    from caduceus.evaluate.model import Runner
    from caduceus.evaluate.scores import ScoreOptions
    from caduceus.evaluate.variant_inputs import VariantSource
    from caduceus.evaluate.variants import score_every_snv, score_file

    arguments.scores = tuple(arguments.scores)
    options = _picked(arguments, ScoreOptions)
    runner = Runner(arguments.model, arguments.device, arguments.precision)
    if arguments.every_snv is None:
        found = score_file(runner, _picked(arguments, VariantSource), arguments.out, options)
    elif arguments.genome is None:
        raise UserError("--every-snv: names places of a genome; give its file with --genome")
    else:
        found = score_every_snv(
            runner, arguments.every_snv, arguments.genome, arguments.out, options, arguments.aliases
        )
    print(f"{arguments.out}: " + ", ".join(f"{count:,} {kind}" for kind, count in found.items()))
