"""The keys of `data.`: what a run is trained on. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from caduceus.config.keys import key


@dataclass
class DataConfig:
    """What the model is trained on."""

    path: Any = key(
        None,
        "A directory of shards, or a list of {path, weight}; in stream mode tars, as dir/{000..099}.tar, or a list. "
        "Shards may move between two starts: what they hold is checked by their fingerprint.",
        fixes="nothing",
    )
    species_weights: Any = key(
        None,
        "Factors of the weights by which species are drawn, as {human: 4, mouse: 0}, or by steps made, as "
        "[[0, {}], [5000, {human: 4}]]; a species that is not named keeps its weight, one with 0 is not drawn.",
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
        "Leave out a species of `path` from which nothing can be learned: all its windows are shorter than `seq_len`, "
        "no crop has `min_acgt`, or all is lower case at `repeat_weight` 0. Its share of the samples goes to the "
        "others. False refuses it.",
        fixes="nothing",
    )
    allow_commands: bool = key(
        False,
        "Whether `path` and `valid_path` may run commands (`pipe:COMMAND {}`). Always so where the command line gives "
        "them; in a file, which may be somebody else's, only with this key. A run remembers what was allowed, for its "
        "own user, beside its config.yaml and not in it.",
        fixes="nothing",
    )
    seq_len: int = key(1024, "Bases per training sequence.", fixes="order", least=1)
    pack: bool = key(
        False,
        "Fill sequences with the windows that are shorter than `seq_len` and with the ends of others, which no state "
        "crosses, so that an epoch sees every base once. Not with parallel.context.",
        fixes="order",
    )
    crop_offset: str = key(
        "none",
        "Where a window is cut. none: at multiples of `seq_len`, in every epoch. random: each epoch of a species "
        "begins at another base, so that borders move and the ends of windows have their turn; with `pack`, what is "
        "left at both ends of a window is packed.",
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
        "mlm predicts masked bases; next_base, the next one, is for uni-directional models.",
        fixes="order",
        choices=("mlm", "next_base"),
    )
    mask_prob: float = key(0.15, "Share of ACGT bases that are labelled.", fixes="order", least=0, most=1)
    mask_span: int = key(
        1,
        "Bases that are labelled together, and shown alike as [MASK], random bases or themselves: spans that begin "
        "anywhere, `mask_prob` of all bases. Above 1 with mlm only.",
        fixes="order",
        least=1,
        most=1 << 20,
    )
    mask_schedule: Any = key(
        None,
        "`mask_prob` in training by steps made, as [[0, 0.3], [5000, 0.15]]: linear between them, then the last. "
        "Validation masks `mask_prob` all the time.",
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
        "Loss weights of regions: a BED file whose fourth column is the weight, or {species: file}; on top of "
        "`repeat_weight`, in training and validation.",
        fixes="numbers",
    )
    weights_elsewhere: float = key(
        1.0, "Loss weight of bases in no region of a species' `weights_bed`.", fixes="numbers", least=0
    )
    repeat_weight: float = key(1.0, "Loss weight of soft-masked (lower-case) bases.", fixes="numbers", least=0, most=1)
    min_acgt: float = key(
        0.5,
        "Smallest share of ACGT in a crop, by the index's runs of 16 or more other codes.",
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
        "are read. Needed where `path` is a URL (http, https, s3, …, or `pipe:COMMAND {}`); of use for cold or slow "
        "storage.",
        fixes="nothing",
    )
    cache_bytes: int = key(
        0,
        "Most bytes of shards in `cache_dir`; the longest unused go first. 0 is no limit.",
        fixes="nothing",
        least=0,
    )
    check_crc: bool = key(
        True,
        "Check a window's crc32 when a node first reads from it, which reads the window whole, once for all ranks and "
        "workers of the node, and not at all where `cache_dir` has fetched and checked the shard since the start. "
        "False checks only that bytes are bases: for short sequences from more bases than a run ever sees, on storage "
        "where reading is expensive. Shards that are whole give the same samples either way.",
        fixes="nothing",
    )
    max_substituted: int = key(
        100,
        "Samples per rank and start that may be replaced because their bases cannot be read, or in stream mode tars "
        "that are damaged; one more ends the run. It decides whether a run goes on, and not what it computes.",
        fixes="nothing",
        least=0,
    )
