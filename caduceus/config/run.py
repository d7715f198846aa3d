"""The sections of a run's configuration and their keys. Imports no torch."""

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

from caduceus.config.data import DataConfig
from caduceus.config.keys import Key, key, keys_of
from caduceus.config.model import CaduceusConfig
from caduceus.config.train import TrainConfig
from caduceus.devices import DEVICES
from caduceus.errors import UserError


@dataclass
class OpsConfig:
    """How the operations of the model are computed."""

    backend: str = key(
        "auto",
        "Which implementation runs. auto takes triton on a GPU and cpu elsewhere, and the log says which. naive is the "
        "definition, for tests; mamba_ssm has the published kernels, to compare with.",
        fixes="rounding",
        choices=("auto", "naive", "cpu", "triton", "mamba_ssm"),
    )


@dataclass
class ParallelConfig:
    """How ranks divide the work. Losses, gradients and the order of samples are those of one process, to rounding."""

    strategy: str = key(
        "auto",
        "auto takes single for one process; for more, ddp, or fsdp if the model is large. Only deepspeed can read a "
        "checkpoint of deepspeed.",
        fixes="rounding",
        choices=("auto", "single", "ddp", "fsdp", "deepspeed"),
    )
    shard: int = key(
        0,
        "fsdp: number of ranks that share one copy of the parameters; 0 is all ranks. If auto chooses fsdp, 0 is the "
        "ranks of a node.",
        fixes="rounding",
        least=0,
    )
    context: int = key(
        0,
        "Number of ranks that share a sequence, each with a slice of it. If this or strands is 0, it is chosen: the "
        "smallest sharing that gives every rank a part of the global batch, strands first. On GPUs, ranks of a node "
        "share further if a sequence does not fit their memory, or, if train.activation_checkpointing is auto, to "
        "recompute less.",
        fixes="rounding",
        least=0,
    )
    strands: int = key(
        0,
        "With 2, one rank computes the forward strand of a sequence or slice, and another rank its reverse "
        "complement. For model.rcps=true. It halves a rank's work and activations, and only logits are exchanged. 0 "
        "chooses, as for context.",
        fixes="rounding",
        choices=(0, 1, 2),
    )
    zero_stage: int = key(
        1,
        "deepspeed: what is divided over the ranks. 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters.",
        fixes="rounding",
        choices=(0, 1, 2, 3),
    )
    deepspeed_config: str | None = key(
        None,
        "deepspeed: a JSON file of its options. It may not contradict what train.* and parallel.* say.",
        fixes="rounding",
    )
    cpu_offload: bool = key(
        False,
        "fsdp, deepspeed: keep the optimizer state, and sharded parameters, in host memory between uses.",
        fixes="rounding",
    )


@dataclass
class ValidConfig:
    """Validation while training."""

    every: int = key(1000, "Steps between validations; 0 never validates.", fixes="nothing", least=0)
    samples: int = key(256, "Crops per species and validation; fewer if the split has fewer.", fixes="nothing", least=1)


@dataclass
class CheckpointConfig:
    """When checkpoints are written, and which are kept."""

    every: int = key(1000, "Steps between checkpoints; the last step always has one.", fixes="nothing", least=1)
    keep: int = key(3, "How many of the newest checkpoints are kept; 0 keeps all.", fixes="nothing", least=0)
    keep_every: int = key(
        0,
        "Keep for good the checkpoints of steps that are multiples of this; 0 keeps none for good.",
        fixes="nothing",
        least=0,
    )
    export_every: int = key(
        0,
        "Steps between exports to RUN/export/step-…, folders that `transformers` and the published code load. Each is "
        "made from a checkpoint of its step, while training goes on. 0 makes none.",
        fixes="nothing",
        least=0,
    )
    best: str | None = key(
        None,
        "The name of one number of a validation or an evaluation, such as valid_loss or eval/NAME/auprc_llr. At each "
        "step where it is better than before, a checkpoint is written. The best one is never removed, and "
        "checkpoints/best links to it.",
        fixes="nothing",
    )
    best_is: str | None = key(
        None,
        "Whether the greatest or the least value of `best` is the best one.",
        fixes="nothing",
        choices=(None, "max", "min"),
    )
    async_: bool = key(True, "Write checkpoints while training goes on, from a copy in host memory.", fixes="nothing")


@dataclass
class RunConfig:
    """The run itself: its directory, its name, and the device on which it computes."""

    dir: str | None = key(
        None,
        "Run directory; null is runs/NAME. If the directory holds a run of the same configuration, that run is "
        "resumed, also after it was moved.",
        fixes="nothing",
    )
    name: str | None = key(None, "Name of the run; null is the name of the YAML file.", fixes="nothing")
    device: str = key("auto", "Where the model computes.", fixes="rounding", choices=DEVICES)
    time_budget_minutes: float = key(
        0.0,
        "After this long, stop with a checkpoint and the exit status 75, which means that the run wants to go on; 0 "
        "is no limit.",
        fixes="nothing",
        least=0,
    )
    allow_change: list[str] = key(
        [], "Keys, such as train.steps, that may differ from the run being resumed.", fixes="nothing"
    )


@dataclass
class MonitorConfig:
    """What is recorded for those who watch a run."""

    every: int = key(
        100,
        "Steps between rows that also have gradient norms and updates by kind of parameter, step sizes, decays and "
        "the scale of activations by layer, and the epoch of each species; 0 is never.",
        fixes="nothing",
        least=0,
    )
    machine_seconds: float = key(
        60.0,
        "Seconds between rows that show what each node and each GPU does: processors, memory, disk, network; 0 is "
        "never.",
        fixes="nothing",
        least=0,
    )
    windows: int = key(
        1,
        "How many of the worst and of the best sequences of each species a validation reports and draws, base by "
        "base; 0 is none.",
        fixes="nothing",
        least=0,
    )
    profile: str | None = key(
        None,
        "First and last of the steps that are profiled, such as 10:13. Profiling writes a trace to RUN/profile, on "
        "GPUs also a snapshot of memory, and a table to the log. null profiles none.",
        fixes="nothing",
    )
    profile_ranks: list[int] = key([0], "Ranks that are profiled.", fixes="nothing", least=0)
    report: bool = key(True, "Make RUN/report/report.html when the run is complete.", fixes="nothing")


@dataclass
class WandbConfig:
    """What Weights & Biases gets of a run."""

    mode: str = key(
        "auto",
        "auto takes WANDB_MODE if it is set; otherwise online if you are logged in to W&B, and offline if not.",
        fixes="nothing",
        choices=("auto", "online", "offline", "disabled"),
    )
    project: str | None = key(None, "Project of W&B; null is WANDB_PROJECT, or caduceus.", fixes="nothing")
    entity: str | None = key(None, "User or team of W&B; null is WANDB_ENTITY, or your own user.", fixes="nothing")
    id: str | None = key(
        None,
        "Id of the run in W&B; null makes one, which the run directory keeps.",
        fixes="nothing",
    )
    group: str | None = key(None, "Group of runs in W&B; null is WANDB_RUN_GROUP.", fixes="nothing")
    tags: list[str] = key([], "Tags of the run in W&B; an empty list is WANDB_TAGS.", fixes="nothing")
    notes: str | None = key(None, "Notes on the run in W&B; null is WANDB_NOTES.", fixes="nothing")
    job_type: str | None = key(None, "Type of the run in W&B, such as pretrain.", fixes="nothing")
    log_every: int = key(
        1,
        "Steps between the rows that W&B gets. It also gets all rows with a validation or with entries of "
        "`monitor.every`. metrics.jsonl has all rows.",
        fixes="nothing",
        least=1,
    )
    artifacts: list[str] = key(
        [],
        "What W&B gets as artifacts when a start ends: any of dataset, checkpoints, exports and report. It gets the "
        "manifest, the report, and references to the shards and to the newest checkpoint and export, whose files stay "
        "where they are.",
        fixes="nothing",
    )
    artifact_files: bool = key(
        False,
        "Send the files of checkpoints and exports themselves, when the run is complete, or by `launch/runs.py sync`.",
        fixes="nothing",
    )
    save_code: bool = key(False, "Send the package's code to W&B, as an artifact.", fixes="nothing")
    alerts: bool = key(True, "Let W&B alert its user of skipped steps, rewinds, stalls and failures.", fixes="nothing")
    required: bool = key(
        False, "Refuse to start if W&B cannot be reached. false sends the rows later.", fixes="nothing"
    )


@dataclass
class Config:
    """The whole configuration of a run. The sections define the keys."""

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
    evaluations: dict[str, Any] = field(default_factory=dict)


SECTIONS: dict[str, Any] = {section.name: section.type for section in fields(Config) if is_dataclass(section.type)}
"""The dataclass of each section; its docstring says what the section is about."""
KEYS: dict[str, Key] = {found.name: found for section, cls in SECTIONS.items() for found in keys_of(section, cls)}
"""Every key, by its name `section.key`."""


ARTIFACTS = ("dataset", "checkpoints", "exports", "report")
"""What `wandb.artifacts` may name."""


def profiled_steps(asked: str) -> tuple[int, int]:
    """First and last step of `monitor.profile`. Raises `UserError` where it does not name two.

    YAML reads 10:13 as a number in base 60, so the value may be 613 here.
    """
    first, colon, last = asked.partition(":")
    if not colon and asked.isdigit():
        first, last = (str(number) for number in divmod(int(asked), 60))
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last)):
        raise UserError(f"monitor.profile: give the first and the last step, such as 10:13; got '{asked}'")
    return int(first), int(last)
