"""The configuration of a run: dataclasses <-> YAML <-> dotted overrides.

A pretrain YAML composes other files by `defaults: [model/NAME, data/NAME]` (paths under the same configs/ folder),
its own keys come on top, and `key.path=value` overrides come last. An unknown key, a wrong type or an impossible
combination is a `UserError` that names the key. Nothing here imports torch.
"""

import keyword
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caduceus.alphabet import VOCAB_SIZE
from caduceus.config_checks import refuse_impossible_values
from caduceus.errors import UserError
from caduceus.files import write_atomically


@dataclass
class CaduceusConfig:
    """The model. Keys and defaults are the published ones (Schiff et al. 2024, arXiv:2403.03234)."""

    d_model: int = 256
    """Width of one strand's hidden state."""
    n_layer: int = 4
    vocab_size: int = VOCAB_SIZE
    pad_vocab_size_multiple: int = 8
    """The vocabulary is padded up to a multiple of this."""
    d_state: int = 16
    """States per inner channel of the scan."""
    d_conv: int = 4
    """Width of the causal convolution, in bases."""
    expand: int = 2
    """Inner channels per model channel."""
    rcps: bool = False
    """Caduceus-PS: both strands share parameters; reverse-complement equivariant. False is Caduceus-Ph."""
    bidirectional: bool = True
    bidirectional_strategy: str = "add"
    """How the two directions join: add | ew_multiply."""
    bidirectional_weight_tie: bool = True
    """Share the in and out projections between the directions."""
    rms_norm: bool = True
    """RMSNorm; False is LayerNorm."""
    norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    """Sum the blocks' outputs in fp32; False in the type of products, bf16 with `train.precision: bf16`, which keeps
    less memory and rounds every sum. (Published training was in fp32 either way: its embeddings are.)"""
    fused_add_norm: bool = True
    """With rcps, the block form: True swaps the strands in every block, as the published checkpoints were trained;
    False is the paper's equation. Without rcps both are the same function."""

    @property
    def d_inner(self) -> int:
        """Inner channels E of the scan."""
        return self.expand * self.d_model

    @property
    def dt_rank(self) -> int:
        """Rank of the projection that makes the step sizes."""
        return math.ceil(self.d_model / 16)

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.pad_vocab_size_multiple
        return math.ceil(self.vocab_size / multiple) * multiple

    def __post_init__(self) -> None:
        for key in ("d_model", "n_layer", "d_state", "d_conv", "expand", "pad_vocab_size_multiple"):
            if getattr(self, key) < 1:
                raise UserError(f"model.{key}: must be at least 1, got {getattr(self, key)}")
        if not 0 < self.norm_epsilon < math.inf:
            raise UserError(f"model.norm_epsilon: must be a positive number, got {self.norm_epsilon}")
        if self.vocab_size != VOCAB_SIZE:
            raise UserError(f"model.vocab_size: the DNA alphabet has {VOCAB_SIZE} tokens, got {self.vocab_size}")
        if self.bidirectional_strategy not in ("add", "ew_multiply"):
            raise UserError(
                f"model.bidirectional_strategy: choose add or ew_multiply, got '{self.bidirectional_strategy}'"
            )


@dataclass
class OpsConfig:
    backend: str = "auto"
    """Which implementation of the model's ops runs: auto | naive | cpu | triton | mamba_ssm. auto takes triton on a
    GPU and cpu elsewhere, and the log says which."""


@dataclass
class DataConfig:
    path: Any = None
    """A directory of shards, or a list of {path, weight}; in stream mode tars, as dir/{000..099}.tar, or a list."""
    mode: str = "shards"
    """shards | stream. stream reads foreign tars without an index, with weaker guarantees, which the log states."""
    stream_key: str = "seq"
    """stream: extension of the members of a tar that hold bases."""
    valid_path: Any = None
    """stream: tars to validate on."""
    seq_len: int = 1024
    """Bases per training sequence."""
    strands: str = "auto"
    """auto | both | forward. auto is forward for rcps (the model sees both strands by itself), both otherwise."""
    objective: str = "mlm"
    """mlm | next_base. next_base is for uni-directional models."""
    mask_prob: float = 0.15
    """Share of ACGT bases that are labelled."""
    mask_token_prob: float = 0.8
    """Share of labelled bases that the input shows as [MASK]."""
    random_token_prob: float = 0.1
    """Share of labelled bases that the input shows as a random base; the rest is shown as it is."""
    repeat_weight: float = 1.0
    """Loss weight of soft-masked (lower-case) bases."""
    min_acgt: float = 0.5
    """Smallest share of ACGT in a crop, by the index's runs of 16 or more other codes."""
    workers: int = 2
    """Loader processes per rank; 0 loads in the training process."""
    shuffle_block: int = 0
    """Shards of a source in play at once within an epoch; 0 shuffles over all of them."""
    cache_dir: str | None = None
    """A directory on a local disk, shared by the ranks of a node, into which shards are fetched whole before they are
    read. Needed where `path` is a URL (http, https, s3, …, or `pipe:COMMAND {}`); of use for cold or slow storage."""
    cache_bytes: int = 0
    """Most bytes of shards in `cache_dir`; the longest unused go first. 0 is no limit."""
    check_crc: bool = True
    """Check a window's crc32 when a worker first reads from it, which reads the window whole. False checks only that
    bytes are bases: for short sequences from more bases than a run ever sees, on storage where reading is dear."""
    max_substituted: int = 100
    """Samples per rank and start that may be replaced because their bases cannot be read; one more ends the run."""


@dataclass
class TrainConfig:
    steps: int = 10000
    global_batch: int = 8
    """Sequences per optimizer step, over all ranks."""
    micro_batch: int = 8
    """Sequences per forward and backward pass on a rank; accumulation follows."""
    lr: float = 8e-3
    min_lr: float = 1e-4
    """Learning rate at the end of the cosine."""
    warmup_steps: int | None = None
    """Steps of linear warm-up from 1e-6; null is a tenth of `steps`."""
    weight_decay: float = 0.1
    """Not applied to biases, norms, A_log and D."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    max_skipped_steps: int = 10
    """Steps in a row whose loss or gradient may be NaN or infinite, and which are skipped; one more ends the run."""
    spike_factor: float = 0.0
    """A loss above this many times its running mean rewinds the run to its newest checkpoint, to go on there with the
    samples that follow the spike; 0 lets the loss spike."""
    stall_minutes: float = 15.0
    """A step, or a batch of a validation, that takes longer has hung: every rank writes its stacks to the run's logs
    and ends. The start and a checkpoint may take two hours. 0 waits for ever."""
    seed: int = 0
    precision: str = "fp32"
    """fp32 | bf16 (autocast; parameters and the scan's state stay fp32) | fp64 (all in double, to verify numerics; on a
    GPU by the slow ops.backend=naive)."""
    deterministic: bool = False
    """The same bits in every run on the same layout and machines, at some cost of speed on GPUs."""
    compile: bool = False
    """torch.compile every block."""
    activation_checkpointing: str = "none"
    """none | scan | block | auto. What the backward pass recomputes of every block instead of keeping it: scan what
    feeds the scan (convolution, step sizes, B and C), nearly half of what is kept and soon made again; block all
    activations. auto takes scan in as few blocks as the memory that is free at the start demands, and where scan in all
    is not enough, block in as few as need it."""


@dataclass
class ParallelConfig:
    strategy: str = "auto"
    """auto | single | ddp | fsdp | deepspeed. auto takes single for one process, and ddp or fsdp, by the size of the
    model, for more."""
    shard: int = 0
    """fsdp: ranks that share one copy of the parameters; 0 is all of them. Where auto chooses fsdp, 0 is those of a
    node."""
    context: int = 0
    """Ranks that share a sequence, each with a slice of it. 0, here or for strands: as few as it takes to give every
    rank a part of the global batch, and rather strands than slices."""
    strands: int = 0
    """2: of every sequence, or slice of one, one rank computes the forward strand and another one the reverse
    complement. For model.rcps=true; halves a rank's work and activations, and only logits go from one to the other."""
    zero_stage: int = 1
    """deepspeed: what ranks divide among them. 0 nothing, 1 optimizer state, 2 gradients as well, 3 parameters too."""
    deepspeed_config: str | None = None
    """deepspeed: a JSON file of its options. What train.* and parallel.* decide may not contradict it."""
    cpu_offload: bool = False
    """fsdp, deepspeed: keep optimizer state, and parameters where they are sharded, in host memory between uses."""


@dataclass
class ValidConfig:
    every: int = 1000
    """Steps between validations; 0 never validates."""
    samples: int = 256
    """Crops per species and validation; fewer where the split has fewer."""


@dataclass
class CheckpointConfig:
    every: int = 1000
    """Steps between checkpoints; the last step always has one."""
    keep: int = 3
    """Newest checkpoints kept; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of steps that this divides are kept for good; 0 keeps none so."""
    async_: bool = True
    """Write checkpoints while training goes on, from a copy in host memory. The key is `async`."""


@dataclass
class RunConfig:
    dir: str | None = None
    """Run directory; null is runs/NAME. A directory that holds a run of the same configuration is resumed."""
    name: str | None = None
    """Name of the run; null is the name of the YAML file."""
    device: str = "auto"
    """auto | cpu | cuda."""
    time_budget_minutes: float = 0.0
    """Stop with a checkpoint and the exit status for a requeue after this long; 0 is no limit."""
    allow_change: list[str] = field(default_factory=list)
    """Keys, such as train.steps, that may differ from the run being resumed."""


@dataclass
class WandbConfig:
    mode: str = "auto"
    """online | offline | disabled | auto (online when logged in to W&B, offline otherwise)."""
    project: str = "caduceus"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


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
    wandb: WandbConfig = field(default_factory=WandbConfig)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file with its `defaults`, apply `key.path=value` overrides, and check the result.

    Raises `UserError` naming the file or key for anything that is not a valid configuration.
    """
    path = Path(path)
    layers = [*_read_layers(path), *(_parse_override(override) for override in overrides)]
    config = _merge(layers)
    if config.run.name is None:
        config.run.name = path.stem
    if config.run.dir is None:
        config.run.dir = f"runs/{config.run.name}"
    return config


def config_from_dict(values: dict[str, Any]) -> Config:
    """A checked configuration from plain nested values, as `config_to_dict` gives them."""
    return _merge([("configuration", OmegaConf.create(values))])


def config_to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain nested dicts and lists, every key present."""
    values = OmegaConf.to_container(OmegaConf.structured(config))
    return {section: {_key(name): value for name, value in keys.items()} for section, keys in values.items()}


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML; `load_config` of that file gives it back."""
    write_atomically(path, OmegaConf.to_yaml(config_to_dict(config)).encode())


def _read_layers(path: Path, including: tuple[Path, ...] = ()) -> list[tuple[str, DictConfig]]:
    """(origin, values) of a file: what its `defaults` name first, its own keys last."""
    if path.resolve() in including:
        raise UserError(f"{path}: 'defaults' include each other in a circle")
    try:
        values = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except Exception as error:
        raise UserError(f"{path}: not readable as YAML: {_one_line(error)}") from None
    if not isinstance(values, DictConfig):
        raise UserError(
            f"{path}: a configuration is a mapping of sections, such as 'train:' with 'steps: 1000' below it"
        )
    layers = []
    for name in values.pop("defaults", None) or []:
        included = path.parent.parent / f"{name}.yaml"
        if not included.is_file():
            raise UserError(f"{path}: 'defaults' names '{name}', but there is no file {included}")
        layers += _read_layers(included, (*including, path.resolve()))
    return [*layers, (str(path), values)]


def _parse_override(override: str) -> tuple[str, DictConfig]:
    key, equals, _ = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(f"'{override}': expected an override of the form key.path=value, such as train.lr=1e-3")
    try:
        return f"'{override}'", OmegaConf.from_dotlist([override])
    except Exception as error:
        raise UserError(f"'{override}': {_one_line(error)}") from None


def _merge(layers: list[tuple[str, DictConfig]]) -> Config:
    merged = OmegaConf.structured(Config)
    for origin, values in layers:
        _refuse_unknown_keys(merged, values, origin)
        try:
            merged = OmegaConf.merge(merged, _attributes(values))
        except OmegaConfBaseException as error:
            raise UserError(f"{origin}: {_key(error.full_key or 'value')}: {_one_line(error)}") from None
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise UserError(_one_line(error)) from None
    refuse_impossible_values(config, _flat(config))
    return config


def _refuse_unknown_keys(known: DictConfig, values: DictConfig, origin: str, prefix: str = "") -> None:
    for key in values:
        if key not in (names := list(map(_key, known))):
            raise UserError(f"{origin}: unknown key '{prefix}{key}'; known here: {', '.join(names)}")
        if OmegaConf.is_dict(known[_attribute(key)]):
            if not OmegaConf.is_dict(values[key]):
                names = ", ".join(map(_key, known[key]))
                raise UserError(f"{origin}: {prefix}{key}: expected a mapping with keys {names}")
            _refuse_unknown_keys(known[key], values[key], origin, f"{prefix}{key}.")


def _attributes(values: DictConfig) -> DictConfig:
    """Sections of keys -> sections of attributes."""
    sections = {
        section: {_attribute(key): value for key, value in keys.items_ex(resolve=False)}
        if OmegaConf.is_dict(keys)
        else keys
        for section, keys in values.items_ex(resolve=False)
    }
    return OmegaConf.create(sections)


def _attribute(key: str) -> str:
    """The attribute of a key: its name, save that `async` is a word of Python's own."""
    return f"{key}_" if keyword.iskeyword(key) else key


def _key(attribute: str) -> str:
    return attribute.removesuffix("_")


def _flat(config: Config) -> dict[str, Any]:
    """Every key, as `section.key`, with its value."""
    sections = config_to_dict(config).items()
    return {f"{section}.{name}": value for section, keys in sections for name, value in keys.items()}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())
