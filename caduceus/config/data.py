"""The keys of `data.`: what a run is trained on. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from caduceus.config.keys import key


@dataclass
class DataConfig:
    """What the model is trained on."""

    path: Any = key(
        None,
        "A directory of shards, or a list of {path, weight}. In stream mode: tars, such as dir/{000..099}.tar, or a "
        "list of them. Shards may move between two starts, because their content is checked by its fingerprint.",
        fixes="nothing",
    )
    species_weights: Any = key(
        None,
        "Factors by which the weights of species are multiplied, such as {human: 4, mouse: 0}; or by steps made, such "
        "as [[0, {}], [5000, {human: 4}]]. A species that is not named keeps its weight; one with 0 is not drawn.",
        fixes="order",
    )
    mode: str = key(
        "shards",
        "shards reads datasets of data_prep. stream reads foreign tars without an index, with weaker guarantees, "
        "which the log states.",
        fixes="order",
        choices=("shards", "stream"),
    )
    stream_key: str = key("seq", "stream: extension of those files in a tar that hold bases.", fixes="order")
    valid_path: Any = key(None, "stream: tars to validate on.", fixes="nothing")
    allow_unused_species: bool = key(
        False,
        "What to do with a species of `path` from which nothing can be learned: all of its windows are shorter than "
        "`seq_len`, no crop has `min_acgt`, or all bases are lower case at `repeat_weight` 0. true leaves it out, and "
        "its share of the samples goes to the others. false refuses to start.",
        fixes="nothing",
    )
    allow_commands: bool = key(
        False,
        "Whether `path` and `valid_path` in a file may run commands (`pipe:COMMAND {}`). On the command line they "
        "always may. A file may come from somebody else, so it needs this key. A run keeps what was allowed, for its "
        "own user, beside its config.yaml and not in it.",
        fixes="nothing",
    )
    seq_len: int = key(1024, "Bases per training sequence.", fixes="order", least=1)
    pack: bool = key(
        False,
        "Fill further sequences with windows that are shorter than `seq_len` and with the remains of the others, so "
        "that an epoch sees every base once. No state crosses from one to the next. Not with parallel.context.",
        fixes="order",
    )
    crop_offset: str = key(
        "none",
        "Where a window is cut. none: at multiples of `seq_len`, in every epoch. random: each epoch of a species "
        "begins at another base, so that borders move and other epochs see the ends of windows. With `pack`, the "
        "remains at both ends of a window are packed.",
        fixes="order",
        choices=("none", "random"),
    )
    strands: str = key(
        "auto",
        "Which strands samples show. auto is forward for rcps (the model sees both strands by itself), both otherwise.",
        fixes="order",
        choices=("auto", "both", "forward"),
    )
    objective: str = key(
        "mlm",
        "mlm predicts masked bases. next_base predicts the next base, for uni-directional models.",
        fixes="order",
        choices=("mlm", "next_base"),
    )
    mask_prob: float = key(0.15, "Share of ACGT bases that are labelled.", fixes="order", least=0, most=1)
    mask_span: int = key(
        1,
        "Length of the spans in which bases are labelled. The input shows a whole span as [MASK], as random bases, or "
        "as it is. Spans begin anywhere; `mask_prob` of all bases are labelled. Above 1 with mlm only.",
        fixes="order",
        least=1,
        most=1 << 20,
    )
    mask_schedule: Any = key(
        None,
        "`mask_prob` in training by steps made, such as [[0, 0.3], [5000, 0.15]]: linear between these steps, then "
        "the last value. Validation always masks `mask_prob`.",
        fixes="order",
    )
    mask_token_prob: float = key(
        0.8, "Share of labelled bases that the input shows as [MASK].", fixes="order", least=0, most=1
    )
    random_token_prob: float = key(
        0.1,
        "Share of labelled bases that the input shows as a random base; the rest is shown as it is.",
        fixes="order",
        least=0,
        most=1,
    )
    weights_bed: Any = key(
        None,
        "Loss weights of regions: a BED file whose fourth column is the weight, or {species: file}. They are "
        "multiplied with `repeat_weight`, and apply in training and validation.",
        fixes="numbers",
    )
    weights_elsewhere: float = key(
        1.0, "Loss weight of bases that are in no region of a species' `weights_bed`.", fixes="numbers", least=0
    )
    repeat_weight: float = key(1.0, "Loss weight of soft-masked (lower-case) bases.", fixes="numbers", least=0, most=1)
    min_acgt: float = key(
        0.5,
        "Smallest share of ACGT in a crop. It is taken from the index, which has the runs of 16 or more other codes.",
        fixes="order",
        least=0,
        most=1,
    )
    workers: int = key(2, "Loader processes per rank; 0 loads in the training process.", fixes="nothing", least=0)
    shuffle_block: int = key(
        0,
        "How many shards of a source are used at once within an epoch; 0 shuffles over all of them.",
        fixes="order",
        least=0,
    )
    cache_dir: str | None = key(
        None,
        "A directory on a local disk, shared by the ranks of a node, into which shards are fetched whole before they "
        "are read. Needed if `path` is an address (http, https, s3, …) or `pipe:COMMAND {}`; helps with slow storage.",
        fixes="nothing",
    )
    cache_bytes: int = key(
        0,
        "Most bytes of shards in `cache_dir`; those that were not used for the longest time are removed first. 0 is "
        "no limit.",
        fixes="nothing",
        least=0,
    )
    check_crc: bool = key(
        True,
        "Check a window's crc32 when a node first reads from it. This reads the window whole, once for all ranks and "
        "workers of the node; it is left out if `cache_dir` has fetched and checked the shard since the start. false "
        "only checks that bytes are bases: choose it if storage is slow, sequences are short, and the run never sees "
        "most of the bases. Undamaged shards give the same samples with both values.",
        fixes="nothing",
    )
    max_substituted: int = key(
        100,
        "How many samples (in stream mode: damaged tars) each rank may replace in a start because they cannot be "
        "read; one more ends the run. It decides whether a run goes on, not what it computes.",
        fixes="nothing",
        least=0,
    )
