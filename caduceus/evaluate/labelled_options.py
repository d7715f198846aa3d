"""The options of verbs that learn from labelled sequences. Imports no torch."""

import argparse


def add_labelled(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where labelled sequences come from, and what is learnt from them."""
    help_ = "CSV, TSV or parquet of sequence, label; FASTA with |LABEL; BED with --genome; or a benchmark's folder"
    parser.add_argument("--train", required=True, metavar="FILE", help=help_)
    parser.add_argument("--valid", metavar="FILE", help="for choosing; default: a share of train")
    parser.add_argument("--test", metavar="FILE", help="for measuring at the end")
    parser.add_argument("--genome", metavar="FASTA", help="the genome of a BED")
    parser.add_argument("--aliases", metavar="FILE", help="a table of names of contigs")
    parser.add_argument("--window", type=int, metavar="N", help="bases around the middle of each BED row")
    parser.add_argument("--bigwig", metavar="FILE", help="values that label rows of a BED; default: their names")
    parser.add_argument("--signal", default="mean", metavar="mean|max", help="label of a row; per-base has each value")
    parser.add_argument("--column", default="sequence", help="column of the sequences; default sequence")
    parser.add_argument("--label", default="label", metavar="NAMES", help="column of the labels, or several as a,b")
    parser.add_argument("--longest", type=int, metavar="N", help="refuse sequences with more bases")
    kinds = "auto, classification, regression, multilabel or per-base"
    parser.add_argument("--task", default="auto", metavar="KIND", help=kinds)
    help_ = "over all bases, or over M before and N after the centre"
    parser.add_argument("--pool", default="mean", metavar="mean|max|centre|middle:M:N", help=help_)
    parser.add_argument("--valid-share", type=float, default=0.1, help="share of train to validate on; default 0.1")
