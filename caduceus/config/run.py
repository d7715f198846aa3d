"""The sections of a run's configuration and their keys. Imports no torch."""

from dataclasses import dataclass, field, fields
from typing import Any

from caduceus.config.keys import Key, key, keys_of
from caduceus.config.model import CaduceusConfig


@dataclass
class OpsConfig:
    """Which implementation of the model's ops runs."""

    backend: str = key(
        "auto",
        "Which implementation of the model's ops runs. auto takes triton on a GPU and cpu elsewhere, and the log says "
        "which.",
        fixes="rounding",
        choices=("auto", "naive", "cpu", "triton", "mamba_ssm"),
    )


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
        "them; in a file, which may be somebody else's, only with this key.",
        fixes="nothing",
    )
    seq_len: int = key(1024, "Bases per training sequence.", fixes="order", least=1)
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


@dataclass
class TrainConfig:
    """The optimization."""

    steps: int = key(
        10000, "Optimizer steps of the run. The learning rate falls to its end by the last.", fixes="numbers", least=1
    )
    global_batch: int = key(8, "Sequences per optimizer step, over all ranks.", fixes="order", least=1)
    micro_batch: int = key(
        8,
        "Sequences per forward and backward pass on a rank; accumulation follows.",
        fixes="rounding",
        least=1,
    )
    lr: float = key(8e-3, "Largest learning rate, at the end of the warm-up.", fixes="numbers", least=0)
    min_lr: float = key(1e-4, "Learning rate at the end of the cosine.", fixes="numbers", least=0)
    warmup_steps: int | None = key(
        None, "Steps of linear warm-up from 1e-6; null is a tenth of `steps`.", fixes="numbers", least=0
    )
    weight_decay: float = key(0.1, "Not applied to biases, norms, A_log and D.", fixes="numbers", least=0)
    betas: list[float] = key(
        [0.9, 0.95], "Decay of AdamW's two moments from step to step.", fixes="numbers", least=0, below=1
    )
    clip_norm: float = key(1.0, "Largest global norm of the gradient; 0 turns clipping off.", fixes="numbers", least=0)
    max_skipped_steps: int = key(
        10,
        "Steps in a row whose loss or gradient may be NaN or infinite, and which are skipped; one more ends the run. "
        "Such steps are skipped whatever the limit is: it decides whether a run goes on, and not what it computes.",
        fixes="nothing",
        least=0,
    )
    spike_factor: float = key(
        0.0,
        "A loss above this many times its running mean rewinds the run to its newest checkpoint, to go on there with "
        "the samples that follow the spike; 0 lets the loss spike. It decides which updates are made.",
        fixes="numbers",
        least=0,
    )
    stall_minutes: float = key(
        15.0,
        "A step, or a batch of a validation, that takes longer has hung: every rank writes its stacks to the run's "
        "logs and ends. The start and a checkpoint may take two hours. 0 waits without an end.",
        fixes="nothing",
        least=0,
    )
    seed: int = key(0, "Of the first parameters, the order of samples, strands and masks.", fixes="order", least=0)
    precision: str = key(
        "fp32",
        "bf16 is autocast: parameters and the scan's state stay fp32. fp64 computes all in double, to verify numerics; "
        "on a GPU by the slow ops.backend=naive.",
        fixes="numbers",
        choices=("fp32", "bf16", "fp64"),
    )
    deterministic: bool = key(
        False,
        "The same bits in every run on the same layout and machines, at some cost of speed on GPUs.",
        fixes="rounding",
    )
    compile: bool = key(False, "torch.compile every block.", fixes="rounding")
    activation_checkpointing: str = key(
        "none",
        "What the backward pass recomputes of every block instead of keeping it: scan what feeds the scan "
        "(convolution, step sizes, B and C), nearly half of what is kept and soon made again; block all activations. "
        "auto takes scan in as few blocks as the memory that is free at the start demands, and where scan in all is "
        "not enough, block in as few as need it.",
        fixes="rounding",
        choices=("none", "scan", "block", "auto"),
    )


@dataclass
class ParallelConfig:
    """How ranks divide the work. Losses, gradients and the order of samples are those of one process, to rounding."""

    strategy: str = key(
        "auto",
        "auto takes single for one process, and ddp or fsdp, by the size of the model, for more. A checkpoint of "
        "deepspeed goes on under deepspeed only.",
        fixes="rounding",
        choices=("auto", "single", "ddp", "fsdp", "deepspeed"),
    )
    shard: int = key(
        0,
        "fsdp: ranks that share one copy of the parameters; 0 is all of them. Where auto chooses fsdp, 0 is those of a "
        "node.",
        fixes="rounding",
        least=0,
    )
    context: int = key(
        0,
        "Ranks that share a sequence, each with a slice of it. 0, here or for strands: as few as it takes to give "
        "every rank a part of the global batch, and rather strands than slices.",
        fixes="rounding",
        least=0,
    )
    strands: int = key(
        0,
        "2: of every sequence, or slice of one, one rank computes the forward strand and another one the reverse "
        "complement. For model.rcps=true; halves a rank's work and activations, and only logits go from one to the "
        "other.",
        fixes="rounding",
        choices=(0, 1, 2),
    )
    zero_stage: int = key(
        1,
        "deepspeed: what ranks divide among them. 0 nothing, 1 optimizer state, 2 gradients as well, 3 parameters too.",
        fixes="rounding",
        choices=(0, 1, 2, 3),
    )
    deepspeed_config: str | None = key(
        None,
        "deepspeed: a JSON file of its options. What train.* and parallel.* decide may not contradict it.",
        fixes="rounding",
    )
    cpu_offload: bool = key(
        False,
        "fsdp, deepspeed: keep optimizer state, and parameters where they are sharded, in host memory between uses.",
        fixes="rounding",
    )


@dataclass
class ValidConfig:
    """Validation while training."""

    every: int = key(1000, "Steps between validations; 0 never validates.", fixes="nothing", least=0)
    samples: int = key(
        256, "Crops per species and validation; fewer where the split has fewer.", fixes="nothing", least=1
    )


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every: int = key(1000, "Steps between checkpoints; the last step always has one.", fixes="nothing", least=1)
    keep: int = key(3, "Newest checkpoints kept; 0 keeps all.", fixes="nothing", least=0)
    keep_every: int = key(
        0, "Checkpoints of steps that this divides are kept for good; 0 keeps none so.", fixes="nothing", least=0
    )
    async_: bool = key(True, "Write checkpoints while training goes on, from a copy in host memory.", fixes="nothing")


@dataclass
class RunConfig:
    """The run itself: where it lies, and where it computes."""

    dir: str | None = key(
        None,
        "Run directory; null is runs/NAME. A directory that holds a run of the same configuration is resumed, also "
        "after it was moved.",
        fixes="nothing",
    )
    name: str | None = key(None, "Name of the run; null is the name of the YAML file.", fixes="nothing")
    device: str = key("auto", "Where the model computes.", fixes="rounding", choices=("auto", "cpu", "cuda"))
    time_budget_minutes: float = key(
        0.0,
        "Stop with a checkpoint and the exit status for a requeue after this long; 0 is no limit.",
        fixes="nothing",
        least=0,
    )
    allow_change: list[str] = key(
        [], "Keys, such as train.steps, that may differ from the run being resumed.", fixes="nothing"
    )


@dataclass
class MonitorConfig:
    """What is kept for those who watch a run."""

    every: int = key(
        100,
        "Steps between rows that also tell gradient norms and updates by kind of parameter, step sizes, decays and the "
        "scale of activations by layer, and the epoch of each species; 0 never tells.",
        fixes="nothing",
        least=0,
    )
    windows: int = key(
        1,
        "Worst and best sequences of each species, so many of each, that a validation tells and draws base by base; 0 "
        "leaves them out.",
        fixes="nothing",
        least=0,
    )
    report: bool = key(True, "Make RUN/report/report.html when the run is complete.", fixes="nothing")


@dataclass
class WandbConfig:
    """Weights & Biases."""

    mode: str = key(
        "auto",
        "auto is WANDB_MODE where that is set; else online when logged in to W&B, offline otherwise.",
        fixes="nothing",
        choices=("auto", "online", "offline", "disabled"),
    )
    project: str | None = key(None, "Project of W&B; null is WANDB_PROJECT, or caduceus.", fixes="nothing")
    entity: str | None = key(None, "User or team of W&B; null is WANDB_ENTITY, or your own.", fixes="nothing")
    group: str | None = key(None, "Group of runs in W&B; null is WANDB_RUN_GROUP.", fixes="nothing")
    tags: list[str] = key([], "Tags of the run in W&B; none is WANDB_TAGS.", fixes="nothing")
    notes: str | None = key(None, "Notes on the run in W&B; null is WANDB_NOTES.", fixes="nothing")
    job_type: str | None = key(None, "Type of the run in W&B, such as pretrain.", fixes="nothing")
    required: bool = key(
        False, "Refuse to start where W&B cannot be reached, instead of sending it later.", fixes="nothing"
    )


@dataclass
class Config:
    """All of a run. See the sections for their keys."""

    model: CaduceusConfig = field(default_factory=CaduceusConfig)
    ops: OpsConfig = field(default_factory=OpsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    valid: ValidConfig = field(default_factory=ValidConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


SECTIONS: dict[str, Any] = {section.name: section.type for section in fields(Config)}
"""The dataclass of each section; its docstring says what the section is about."""
KEYS: dict[str, Key] = {found.name: found for section, cls in SECTIONS.items() for found in keys_of(section, cls)}
"""Every key, by its name `section.key`."""
