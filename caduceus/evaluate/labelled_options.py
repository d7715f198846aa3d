"""The options of verbs that learn from labelled sequences. Imports no torch."""

import argparse


def add_labelled(parser: argparse.ArgumentParser) -> None:
    """Where the labelled sequences of a verb come from, and what is to be learnt of them."""
    help_ = "CSV, TSV or parquet of sequence, label; FASTA with |LABEL; BED with --genome; or a benchmark's folder"
    parser.add_argument("--train", required=True, metavar="FILE", help=help_)
    parser.add_argument("--valid", metavar="FILE", help="to choose by; default a share of train")
    parser.add_argument("--test", metavar="FILE", help="measured at the end")
    parser.add_argument("--genome", metavar="FASTA", help="the genome that a BED is about")
    parser.add_argument("--aliases", metavar="FILE", help="a table of names of contigs")
    parser.add_argument("--window", type=int, metavar="N", help="bases about the middle of each BED row")
    parser.add_argument("--bigwig", metavar="FILE", help="labels of a BED: its values; default the column of names")
    parser.add_argument("--signal", default="mean", metavar="mean|max", help="of them; --task per-base takes each")
    parser.add_argument("--column", default="sequence", help="of the sequences; default sequence")
    parser.add_argument("--label", default="label", metavar="NAMES", help="column of the labels, or several as a,b")
    parser.add_argument("--longest", type=int, metavar="N", help="refuse sequences of more bases")
    kinds = "auto, classification, regression, multilabel or per-base"
    parser.add_argument("--task", default="auto", metavar="KIND", help=kinds)
    help_ = "over all bases, or M before and N behind the centre"
    parser.add_argument("--pool", default="mean", metavar="mean|max|centre|middle:M:N", help=help_)
    parser.add_argument("--valid-share", type=float, default=0.1, help="of train without --valid; default 0.1")
