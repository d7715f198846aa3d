"""The options and handler of each verb. Imports no torch before a verb runs."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from caduceus.arguments import Parser, PresetAction
from caduceus.commands import command
from caduceus.data.format import SPLITS
from caduceus.devices import DEVICES
from caduceus.errors import UserError
from caduceus.evaluate.labelled_options import add_labelled

if TYPE_CHECKING:  # these import torch
    from caduceus.evaluate.finetune import FinetuneOptions
    from caduceus.evaluate.labelled import LabelledTable
    from caduceus.evaluate.model import Runner
    from caduceus.evaluate.suite import SuiteRequest
    from caduceus.evaluate.variant_labels import Labels


PLACES = (
    "model",
    "run",
    "export",
    "config",
    "input",
    "every_snv",
    "genome",
    "aliases",
    "train",
    "valid",
    "test",
    "data",
)
"""Options that name existing files or folders."""


def verb_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The parsed options of a verb's command line, with its `handler`."""
    parser = Parser(prog=command("caduceus-evaluate"))
    add_verbs(parser.add_subparsers(dest="command", required=True, metavar="VERB"))
    return parser.parse_args(words)


def add_verbs(commands: Any) -> None:
    """Add all verbs as subcommands of a parser."""
    for add in (_add_heldout, _add_embed, _add_variants, _add_probe, _add_finetune, _add_predict, _add_suite):
        add(commands)


def _add_heldout(commands: Any) -> None:
    parser = commands.add_parser("heldout", help="loss on held-out sequences, per species, in nats per labelled base")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--run", metavar="RUN", help="a run directory (its newest checkpoint), or one of its checkpoints"
    )
    source.add_argument("--export", metavar="DIR", help="a published checkpoint, such as caduceus.hub exports")
    parser.add_argument("--config", metavar="FILE", help="data and masks; default the run's own config.yaml")
    parser.add_argument("--split", choices=SPLITS, default="valid")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="values that override those of the file"
    )
    parser.set_defaults(handler=_heldout)


def _add_embed(commands: Any) -> None:
    parser = commands.add_parser("embed", help="embeddings of sequences, one vector each or one for each base")
    _add_model(parser)
    _add_sequences(parser)
    pools = "mean|max|centre|middle:M:N|base|N"
    help_ = "over all bases, over M bases before and N after the centre, or at base N; base: a vector per base"
    parser.add_argument("--pool", default="mean", metavar=pools, help=help_)
    parser.add_argument("--layer", type=int, default=-1, help="0 the embedding … n_layer or -1 the final norm")
    parser.add_argument("--strands", default="average", metavar="average|concatenate|forward")
    parser.add_argument("--piece", type=int, default=65_536, help="longest sequence of one pass; default 65536")
    _add_batch_bases(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help=".npz, .parquet or .zarr")
    parser.set_defaults(handler=_embed)


def _add_variants(commands: Any) -> None:
    parser = commands.add_parser("variants", help="scores of variants: likelihoods, probabilities, embeddings")
    _add_model(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--input", metavar="FILE", help="VCF, or a CSV, TSV or parquet of chrom, pos, ref, alt")
    what.add_argument("--every-snv", metavar="BED", help="instead of --input: all three substitutions at each place")
    parser.add_argument("--tracks", metavar="PREFIX", help="with --every-snv, also bigWig files PREFIX.entropy.bw, …")
    parser.add_argument("--genome", metavar="FASTA", help="without it, rows of a table need a sequence and its start")
    parser.add_argument("--aliases", metavar="FILE", help="a table of names of contigs")
    parser.add_argument("--scores", nargs="+", default=["masked"], metavar="SCORE", help="masked, unmasked, embedding")
    parser.add_argument("--window", type=int, default=1024, help="bases that the model sees; default 1024")
    parser.add_argument("--strands", default="average", metavar="average|each|forward")
    parser.add_argument("--flank", type=int, default=5, help="bases beside an indel that score it; default 5")
    parser.add_argument("--ref-mismatch", default="refuse", metavar="refuse|skip|swap")
    parser.add_argument("--allow-unknown-contigs", action="store_true", help="leave out variants on other contigs")
    parser.add_argument("--label", metavar="NAME", help="labels, an entry of INFO or a column: measures AUPRC, AUROC")
    parser.add_argument("--positive", nargs="+", default=[], metavar="VALUE", help="positive labels; default 1 or true")
    _add_batch_bases(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help=".vcf, .vcf.gz, .tsv, .csv or .parquet")
    parser.set_defaults(handler=_variants)


def _add_probe(commands: Any) -> None:
    parser = commands.add_parser("probe", help="a linear model on the embeddings of labelled sequences")
    _add_model(parser)
    add_labelled(parser)
    parser.add_argument("--layer", type=int, default=-1, help="0 the embedding … n_layer or -1 the final norm")
    parser.add_argument("--metric", help="metric that chooses the penalty; default mcc or pearson")
    _add_batch_bases(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="a JSON file of the metrics")
    parser.set_defaults(handler=_probe)


def _add_finetune(commands: Any) -> None:
    parser = commands.add_parser("finetune", help="train on labelled sequences, beside baselines on the same split")
    _add_model(parser)
    add_labelled(parser)
    parser.add_argument("--frozen", action="store_true", help="train only the head")
    parser.add_argument("--strands", default="auto", metavar="auto|post-hoc|augment", help="for models other than PS")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train low-rank adapters and the head")
    parser.add_argument("--probe", action="store_true", help="also a linear model on the embeddings")
    parser.add_argument("--baseline", default="", metavar="random,cnn,kmer", help="train these too, on the same split")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="runs, with seeds 1 to N; default 1")
    parser.add_argument("--metric", help="metric that chooses the best epoch; default mcc or pearson")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--patience", type=int, default=0, help="end after this many epochs without a better one")
    parser.add_argument("--class-weights", action="store_true", help="weight all classes alike, whatever their share")
    parser.add_argument("--wandb", default="disabled", metavar="auto|online|offline|disabled", help="default disabled")
    _add_batch_bases(parser)
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.set_defaults(handler=_finetune)


def _add_predict(commands: Any) -> None:
    parser = commands.add_parser("predict", help="predictions of a fine-tuned model for new sequences")
    parser.add_argument("--model", required=True, metavar="DIR", help="OUT/model of finetune")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    _add_sequences(parser)
    _add_batch_bases(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help=".tsv, .csv or .parquet")
    parser.set_defaults(handler=_predict)


def _add_suite(commands: Any) -> None:
    parser = commands.add_parser("suite", help="a benchmark of many tasks, with published numbers for comparison")
    _add_model(parser)
    parser.add_argument("--suite", required=True, action=PresetAction, kind="suite", metavar="NAME|FILE|list")
    parser.add_argument("--data", required=True, metavar="DIR", help="the folder that holds the tasks' folders")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="run only these tasks")
    parser.add_argument("--genome", metavar="FASTA", help="genome, for tasks that are tables of places")
    parser.add_argument("--seeds", type=int, metavar="N", help="default, also of the next: the suite's protocol")
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument("--lr", type=float, nargs="+", metavar="RATE", help="values, of which validation chooses")
    parser.add_argument("--batch-size", type=int, nargs="+", metavar="N", help="values, of which validation chooses")
    parser.add_argument("--window", type=int, metavar="N", help="bases that the model sees, for tasks without training")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.set_defaults(handler=_suite)


def _add_batch_bases(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-bases", type=int, metavar="N", help="bases of a batch; default: what suits the device")


def _add_sequences(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", required=True, metavar="FILE", help="FASTA, 2bit, BED, VCF, CSV, TSV, parquet or shards"
    )
    parser.add_argument("--genome", metavar="FASTA", help="the genome of a BED or VCF")
    parser.add_argument("--aliases", metavar="FILE", help="a table of names of contigs")
    parser.add_argument("--window", type=int, metavar="N", help="bases about each BED row or variant")
    parser.add_argument("--column", default="sequence", help="column of the sequences in a table; default sequence")
    parser.add_argument("--split", default="valid", metavar="|".join(SPLITS), help="split of shards; default valid")


def _add_model(parser: argparse.ArgumentParser) -> None:
    told = "a run, one of its checkpoints, an export or a published folder"
    parser.add_argument("--model", required=True, metavar="DIR", help=told)
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))


def picked(arguments: argparse.Namespace, kind: type) -> Any:
    """The dataclass `kind`, filled with the options of the same names as its fields; for tuples they are lists."""
    values = {field.name: getattr(arguments, field.name) for field in fields(kind)}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _heldout(arguments: argparse.Namespace) -> None:
    from caduceus.config import load_config
    from caduceus.data.loader import build_validation
    from caduceus.distributed.ranks import choose_device
    from caduceus.evaluate.heldout import held_out_loss
    from caduceus.evaluate.parts import ranks_here
    from caduceus.hub import load
    from caduceus.hub.folders import run_of
    from caduceus.ops.backends import check_backend

    if arguments.config is None and arguments.run is None:
        raise UserError(
            "--config: an export does not say which data to use; name a configuration, such as RUN/config.yaml"
        )
    ranks = ranks_here()
    with ranks.agreeing():
        config = load_config(arguments.config or run_of(arguments.run).config_path, arguments.overrides)
        device = choose_device(config.run.device)
        model = load(arguments.run or arguments.export)
        config.model = model.config  # it decides which strands a sample may show
        dtype = next(model.parameters()).dtype
        check_backend(model.backend, device, dtype, config.model)
        batches = build_validation(config, arguments.split, rank=ranks.rank, world=ranks.world, device=device)
    told = held_out_loss(
        model.to(device),
        batches,
        device,
        config.train.precision,
        add_up=lambda sums: ranks.sum(sums.cpu()),
        each=ranks.together,
        mirror=None if config.data.objective == "next_base" else ranks.mirrored,
    )
    _tell(json.dumps(told, indent=1))


def runner_of(arguments: argparse.Namespace) -> "Runner":
    """The model of `--model`, ready to run."""
    from caduceus.evaluate.model import Runner

    return Runner(arguments.model, arguments.device, arguments.precision)


def _tell(line: str) -> None:
    """Print it once, however many ranks share the work."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(line)


def _embed(arguments: argparse.Namespace) -> None:
    from caduceus.evaluate.embed import EmbedOptions, embed_file
    from caduceus.evaluate.sequences import SequenceSource

    options = picked(arguments, EmbedOptions)
    embed_file(runner_of(arguments), picked(arguments, SequenceSource), arguments.out, options)
    _tell(f"{arguments.out}: written")


def labels_asked(arguments: argparse.Namespace) -> "Labels | None":
    """The labels that `--label` and `--positive` of the verb `variants` ask for; None without."""
    from caduceus.evaluate.variant_labels import Labels

    if arguments.label is None and arguments.positive:
        raise UserError("--positive: names values of --label, which is missing")
    return None if arguments.label is None else Labels(arguments.label, tuple(arguments.positive))


def _variants(arguments: argparse.Namespace) -> None:
    from caduceus.evaluate.scores import ScoreOptions
    from caduceus.evaluate.variant_inputs import VariantSource
    from caduceus.evaluate.variants import score_every_snv, score_file

    options = picked(arguments, ScoreOptions)
    labels = labels_asked(arguments)
    areas: dict[str, float] = {}
    if arguments.tracks is not None and arguments.every_snv is None:
        raise UserError("--tracks: needs a value for every place, so it goes only with --every-snv")
    if arguments.every_snv is None:
        source = picked(arguments, VariantSource)
        found = score_file(runner_of(arguments), source, arguments.out, options, labels)
        counts, areas = found.counts, found.areas
    elif arguments.genome is None:
        raise UserError("--every-snv: names places of a genome; give its file with --genome")
    elif labels is not None:
        raise UserError("--label: the places of --every-snv have no labels; give a file of variants with --input")
    else:
        runner, places = runner_of(arguments), arguments.every_snv
        files = places, arguments.genome, arguments.out
        counts = score_every_snv(runner, *files, options, arguments.aliases, arguments.tracks)
    _tell(f"{arguments.out}: " + ", ".join(f"{count:,} {kind}" for kind, count in counts.items()))
    for name, value in areas.items():
        _tell(f"{name}  {value:.4f}" if isinstance(value, float) else f"{name}  {value:,}")


def labelled_tables(arguments: argparse.Namespace) -> "dict[str, LabelledTable]":
    """The tables of `--train`, `--valid` and `--test`."""
    from caduceus.evaluate.labelled_sources import LabelledSource, tables_of

    files = {"train": arguments.train, "valid": arguments.valid, "test": arguments.test}
    columns = arguments.column, arguments.label, arguments.longest
    return tables_of(files, picked(arguments, LabelledSource), columns, arguments.out)


def _probe(arguments: argparse.Namespace) -> None:
    from caduceus.evaluate.probe import ProbeOptions, probe

    tables, options = labelled_tables(arguments), picked(arguments, ProbeOptions)
    result = probe(runner_of(arguments), tables, arguments.out, options)
    for name, metrics in result["metrics"].items():
        _tell(f"{name}: " + ", ".join(f"{metric} {value:.4f}" for metric, value in metrics.items()))
    _tell(f"{arguments.out}: written")


def finetune_options(arguments: argparse.Namespace) -> "FinetuneOptions":
    """The options of the verb `finetune`."""
    from caduceus.evaluate.finetune import FinetuneOptions
    from caduceus.evaluate.fitting import FitOptions

    arguments.baselines = list(filter(None, arguments.baseline.split(",")))
    arguments.fit = picked(arguments, FitOptions)
    return picked(arguments, FinetuneOptions)


def _finetune(arguments: argparse.Namespace) -> None:
    from caduceus.evaluate.finetune import finetune
    from caduceus.evaluate.results import table_of

    tables, options = labelled_tables(arguments), finetune_options(arguments)
    result = finetune(runner_of(arguments), tables, arguments.out, options)
    _tell(f"{table_of(result)}\n{arguments.out}: written")


def _predict(arguments: argparse.Namespace) -> None:
    from caduceus.evaluate.predict import Predictor, predict_file
    from caduceus.evaluate.sequences import SequenceSource

    source = picked(arguments, SequenceSource)
    predict_file(Predictor(arguments.model, arguments.device), source, arguments.out, arguments.batch_bases)
    _tell(f"{arguments.out}: written")


def suite_request(arguments: argparse.Namespace) -> "SuiteRequest":
    """The request of the verb `suite`."""
    from caduceus.evaluate.suite import SuiteRequest

    given = {name: getattr(arguments, name) for name in ("seeds", "epochs", "lr", "batch_size", "window")}
    protocol = {name: value for name, value in given.items() if value is not None}
    return SuiteRequest(arguments.data, arguments.tasks, arguments.genome, protocol)


def _suite(arguments: argparse.Namespace) -> None:
    from caduceus.evaluate.suite import load_suite, run_suite
    from caduceus.evaluate.suite_page import text_table

    suite, request = load_suite(arguments.suite), suite_request(arguments)
    rows = run_suite(runner_of(arguments), suite, request, arguments.out)
    _tell(text_table(rows))
