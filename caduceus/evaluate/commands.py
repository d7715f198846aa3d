"""The options of each verb, and what it does with them. Imports no torch before a verb runs."""

import argparse
import os
from dataclasses import fields
from typing import Any

from caduceus.arguments import PresetAction
from caduceus.errors import UserError


def add_embed(commands: Any) -> None:
    """The verb `embed`."""
    parser = commands.add_parser("embed", help="embeddings of sequences, one vector each or one for each base")
    _add_model(parser)
    _add_sequences(parser)
    parser.add_argument("--pool", default="mean", metavar="mean|max|centre|base|N", help="base: a vector for each base")
    parser.add_argument("--layer", type=int, default=-1, help="0 the embedding … n_layer or -1 the final norm")
    parser.add_argument("--strands", default="average", metavar="average|concatenate|forward")
    parser.add_argument("--piece", type=int, default=65_536, help="longest sequence in one pass; default 65536")
    _add_batch_bases(parser)
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
    _add_batch_bases(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help=".vcf, .vcf.gz, .tsv, .csv or .parquet")
    parser.set_defaults(handler=_variants)


def add_finetune(commands: Any) -> None:
    """The verb `finetune`."""
    parser = commands.add_parser("finetune", help="train on labelled sequences, beside baselines on the same split")
    _add_model(parser)
    help_ = "CSV, TSV or parquet of sequence, label; FASTA with |LABEL; BED with --genome; or a benchmark's folder"
    parser.add_argument("--train", required=True, metavar="FILE", help=help_)
    parser.add_argument("--valid", metavar="FILE", help="to choose the best epoch by; default a share of train")
    parser.add_argument("--test", metavar="FILE", help="measured at the end")
    parser.add_argument("--genome", metavar="FASTA", help="the genome that a BED is about")
    parser.add_argument("--aliases", metavar="FILE", help="a table of names of contigs")
    parser.add_argument("--window", type=int, metavar="N", help="bases about the middle of each BED row")
    parser.add_argument(
        "--bigwig", metavar="FILE", help="labels of a BED: the values there; default its column of names"
    )
    parser.add_argument(
        "--signal", default="mean", metavar="mean|max", help="of the values; --task per-base takes each"
    )
    parser.add_argument("--column", default="sequence", help="of the sequences; default sequence")
    parser.add_argument("--label", default="label", metavar="NAMES", help="column of the labels, or several as a,b")
    parser.add_argument("--longest", type=int, metavar="N", help="refuse sequences of more bases")
    parser.add_argument(
        "--task", default="auto", metavar="KIND", help="auto, classification, regression, multilabel, per-base"
    )
    parser.add_argument("--pool", default="mean", metavar="mean|max|centre")
    parser.add_argument("--frozen", action="store_true", help="train the head alone")
    parser.add_argument("--strands", default="auto", metavar="auto|post-hoc|augment", help="of other models than PS")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train low-rank adapters and the head")
    parser.add_argument("--probe", action="store_true", help="also a linear model on the embeddings")
    parser.add_argument("--baseline", default="", metavar="random,cnn,kmer", help="also these, on the same split")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs, with seeds 1 to N; default 1")
    parser.add_argument("--valid-share", type=float, default=0.1, help="of train without --valid; default 0.1")
    parser.add_argument("--metric", help="what the best epoch is chosen by; default mcc or pearson")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--patience", type=int, default=0, help="end after so many epochs without a better one")
    parser.add_argument("--class-weights", action="store_true", help="classes count alike, whatever their share")
    parser.add_argument("--wandb", default="disabled", metavar="auto|online|offline|disabled", help="default disabled")
    _add_batch_bases(parser)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.set_defaults(handler=_finetune)


def add_predict(commands: Any) -> None:
    """The verb `predict`."""
    parser = commands.add_parser("predict", help="what a fine-tuned model says of new sequences")
    parser.add_argument("--model", required=True, metavar="DIR", help="OUT/model of finetune")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    _add_sequences(parser)
    _add_batch_bases(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help=".tsv, .csv or .parquet")
    parser.set_defaults(handler=_predict)


def add_suite(commands: Any) -> None:
    """The verb `suite`."""
    parser = commands.add_parser("suite", help="a benchmark of many tasks, beside published numbers")
    _add_model(parser)
    parser.add_argument("--suite", required=True, action=PresetAction, kind="suite", metavar="NAME|FILE|list")
    parser.add_argument("--data", required=True, metavar="DIR", help="the folder that holds the tasks' folders")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="these alone")
    parser.add_argument("--genome", metavar="FASTA", help="for tasks that are tables of places")
    parser.add_argument("--seeds", type=int, metavar="N", help="default as the suite's protocol, as are the next")
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument("--lr", type=float, nargs="+", metavar="RATE", help="each is tried on validation")
    parser.add_argument("--batch-size", type=int, nargs="+", metavar="N", help="each is tried on validation")
    parser.add_argument("--window", type=int, metavar="N", help="bases that the model sees, of tasks without training")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.set_defaults(handler=_suite)


def _add_batch_bases(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-bases", type=int, metavar="N", help="bases of a batch; default as suits the device")


def _add_sequences(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--input", required=True, metavar="FILE", help="FASTA, 2bit, BED, VCF, CSV, TSV or parquet")
    parser.add_argument("--genome", metavar="FASTA", help="the genome that a BED or VCF is about")
    parser.add_argument("--aliases", metavar="FILE", help="a table of names of contigs")
    parser.add_argument("--window", type=int, metavar="N", help="bases about each BED row or variant")
    parser.add_argument("--column", default="sequence", help="of the sequences in a table; default sequence")


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


def _finetune(arguments: argparse.Namespace) -> None:
    from caduceus.evaluate.finetune import FinetuneOptions, finetune
    from caduceus.evaluate.fitting import FitOptions
    from caduceus.evaluate.labelled_sources import LabelledSource, labelled_tables
    from caduceus.evaluate.model import Runner
    from caduceus.evaluate.results import table_of

    arguments.baselines = tuple(filter(None, arguments.baseline.split(",")))
    arguments.fit = _picked(arguments, FitOptions)
    options = _picked(arguments, FinetuneOptions)
    files = {"train": arguments.train, "valid": arguments.valid, "test": arguments.test}
    columns = arguments.column, arguments.label, arguments.longest
    tables = labelled_tables(files, _picked(arguments, LabelledSource), columns, arguments.out)
    runner = Runner(arguments.model, arguments.device, arguments.precision)
    result = finetune(runner, tables, arguments.out, options)
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{table_of(result)}\n{arguments.out}: written")


def _predict(arguments: argparse.Namespace) -> None:
    from caduceus.evaluate.predict import Predictor, predict_file
    from caduceus.evaluate.sequences import SequenceSource

    source = _picked(arguments, SequenceSource)
    predict_file(Predictor(arguments.model, arguments.device), source, arguments.out, arguments.batch_bases)
    print(f"{arguments.out}: written")


def _suite(arguments: argparse.Namespace) -> None:
    from caduceus.evaluate.model import Runner
    from caduceus.evaluate.suite import SuiteRequest, load_suite, run_suite
    from caduceus.evaluate.suite_page import text_table

    suite = load_suite(arguments.suite)
    given = {name: getattr(arguments, name) for name in ("seeds", "epochs", "lr", "batch_size", "window")}
    protocol = {name: value for name, value in given.items() if value is not None}
    request = SuiteRequest(arguments.data, arguments.tasks, arguments.genome, protocol)
    runner = Runner(arguments.model, arguments.device, arguments.precision)
    rows = run_suite(runner, suite, request, arguments.out)
    if int(os.environ.get("RANK", 0)) == 0:
        print(text_table(rows))
