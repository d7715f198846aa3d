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
        "where reading is dear. Shards that are whole give the same samples either way.",
        fixes="nothing",
    )
    max_substituted: int = key(
        100,
        "Samples per rank and start that may be replaced because their bases cannot be read, or in stream mode tars "
        "that are damaged; one more ends the run. It decides whether a run goes on, and not what it computes.",
        fixes="nothing",
        least=0,
    )
