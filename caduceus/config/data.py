"""The keys of `data.`: what a run is trained on. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from caduceus.config.keys import key


@dataclass
class DataConfig:
    """What the model is trained on."""

    path: Any = key(
        None,
        "A directory of shards, or a list of {path, weight}; in stream mode tars, such as dir/{000..099}.tar, or a "
        "list of them. Shards may move between two starts: their fingerprint checks what they hold.",
        fixes="nothing",
    )
    species_weights: Any = key(
        None,
        "Factors of the weights by which species are drawn, such as {human: 4, mouse: 0}, or by steps made, such as "
        "[[0, {}], [5000, {human: 4}]]. A species that is not named keeps its weight; one with 0 is not drawn.",
        fixes="order",
    )
    mode: str = key(
        "shards",
        "stream reads foreign tars without an index, with weaker guarantees, which the log states.",
        fixes="order",
        choices=("shards", "stream"),
    )
    stream_key: str = key("seq", "stream: extension of the members of a tar that hold bases.", fixes="order")
    valid_path: Any = key(None, "stream: tars to validate on.", fixes="nothing")
    allow_unused_species: bool = key(
        False,
        "Leave out a species of `path` from which nothing can be learned: all its windows are shorter than "
        "`seq_len`, no crop has `min_acgt`, or all its bases are lower case and `repeat_weight` is 0. Its share of "
        "the samples goes to the others. False refuses it.",
        fixes="nothing",
    )
    allow_commands: bool = key(
        False,
        "Whether `path` and `valid_path` may run commands (`pipe:COMMAND {}`). Addresses typed on the command line "
        "always may; those in a file, which may be somebody else's, only with this key. A run remembers what its "
        "user allowed, in a file beside its config.yaml.",
        fixes="nothing",
    )
    seq_len: int = key(1024, "Bases per training sequence.", fixes="order", least=1)
    pack: bool = key(
        False,
        "Fill sequences with the windows that are shorter than `seq_len` and with the ends of longer ones, so that "
        "an epoch sees every base once. No state passes from one piece to the next. Not with parallel.context.",
        fixes="order",
    )
    crop_offset: str = key(
        "none",
        "Where a window is cut. none: at multiples of `seq_len`, in every epoch. random: each epoch of a species "
        "begins at another base, so that the borders between crops move and the ends of windows are used too; with "
        "`pack`, the rests at both ends of a window are packed.",
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
        "mlm predicts masked bases; next_base predicts the next base, with uni-directional models.",
        fixes="order",
        choices=("mlm", "next_base"),
    )
    mask_prob: float = key(0.15, "Share of ACGT bases that are labelled.", fixes="order", least=0, most=1)
    mask_span: int = key(
        1,
        "Length of the spans of bases that are labelled together and shown alike: as [MASK], as random bases, or "
        "unchanged. Spans begin anywhere; together they cover `mask_prob` of all bases. Above 1 with mlm only.",
        fixes="order",
        least=1,
        most=1 << 20,
    )
    mask_schedule: Any = key(
        None,
        "`mask_prob` in training by steps made, such as [[0, 0.3], [5000, 0.15]]: linear between the points, "
        "constant after the last. Validation always uses `mask_prob`.",
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
        "Loss weights of regions: a BED file whose fourth column is the weight, or {species: file}. They multiply "
        "`repeat_weight`, in training and validation.",
        fixes="numbers",
    )
    weights_elsewhere: float = key(
        1.0, "Loss weight of bases in no region of a species' `weights_bed`.", fixes="numbers", least=0
    )
    repeat_weight: float = key(1.0, "Loss weight of soft-masked (lower-case) bases.", fixes="numbers", least=0, most=1)
    min_acgt: float = key(
        0.5,
        "Smallest share of ACGT in a crop, counted from the index, which knows runs of 16 or more other codes.",
        fixes="order",
        least=0,
        most=1,
    )
    workers: int = key(2, "Loader processes per rank; 0 loads in the training process.", fixes="nothing", least=0)
    shuffle_block: int = key(
        0,
        "Shards of a source in play at once within an epoch; 0 shuffles over all of them.",
        fixes="order",
        least=0,
    )
    cache_dir: str | None = key(
        None,
        "A directory on a local disk, shared by the ranks of a node, into which shards are fetched whole before they "
        "are read. Needed where `path` is a URL (http, https, s3, …, or `pipe:COMMAND {}`); useful for cold or slow "
        "storage.",
        fixes="nothing",
    )
    cache_bytes: int = key(
        0,
        "Most bytes of shards in `cache_dir`; the least recently used are removed first. 0 is no limit.",
        fixes="nothing",
        least=0,
    )
    check_crc: bool = key(
        True,
        "Check a window's crc32 when a node first reads from it. This reads the whole window, once for all ranks and "
        "workers of the node; a shard that `cache_dir` has fetched and checked since the start is not read again. "
        "False checks only that bytes are bases: for short sequences from more bases than a run ever sees, on "
        "storage where reading is expensive. Undamaged shards give the same samples either way.",
        fixes="nothing",
    )
    max_substituted: int = key(
        100,
        "How many samples per rank and start may be replaced because their bases cannot be read (in stream mode: how "
        "many tars may be damaged); one more ends the run. The key decides whether a run goes on, not what it "
        "computes.",
        fixes="nothing",
        least=0,
    )
