"""The keys of `train.`: the optimization. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from caduceus.config.keys import key


@dataclass(repr=False)
class StageConfig:
    """A stage of a run. What is None is as the run has it."""

    seq_len: int | None = None
    global_batch: int | None = None
    micro_batch: int | None = None
    steps: int | None = None
    lr: float | None = None
    min_lr: float | None = None
    schedule: str | None = None
    warmup_steps: int | None = None
    decay_steps: int | None = None
    batch_ramp: Any = None
    mask_prob: float | None = None
    species_weights: Any = None

    def __repr__(self) -> str:
        told = (f"{name}: {value}" for name, value in vars(self).items() if value is not None)
        return f"{{{', '.join(told)}}}"


@dataclass
class TrainConfig:
    """The optimization."""

    steps: int = key(
        10000,
        "Optimizer steps of the run; with `stages`, of all of them. Under cosine and wsd the learning rate falls to "
        "its end by the last.",
        fixes="numbers",
        least=1,
    )
    stages: list[StageConfig] = key(
        [],
        "Stages that the run goes through, a list of {seq_len, global_batch, micro_batch, steps, lr, min_lr, schedule, "
        "warmup_steps, decay_steps, batch_ramp, mask_prob, species_weights}: `steps` and what else differs from the "
        "run's keys. Each has the learning rate and samples of a run of its own; weights and the optimizer's state go "
        "on. `train.stages.2.steps=N` changes one.",
        fixes="numbers",
    )
    global_batch: int = key(8, "Sequences per optimizer step, over all ranks.", fixes="order", least=1)
    batch_ramp: Any = key(
        None,
        "Smaller global batches at the beginning, as [[0, 64], [500, 128], [1500, 256]]: sequences per step from when "
        "so many steps were made; the last is `global_batch`. Not under deepspeed.",
        fixes="order",
    )
    micro_batch: int = key(
        8,
        "Sequences per forward and backward pass on a rank; accumulation follows.",
        fixes="rounding",
        least=1,
    )
    lr: float = key(8e-3, "Largest learning rate, at the end of the warm-up.", fixes="numbers", least=0)
    min_lr: float = key(
        1e-4, "Learning rate at the end of cosine and wsd, and the least of inverse_sqrt.", fixes="numbers", least=0
    )
    optimizer: str = key(
        "adamw",
        "muon: torch's Muon for in_proj, x_proj and out_proj, each direction a matrix of its own, at the size of "
        "AdamW's updates; AdamW for the rest. Under single and ddp.",
        fixes="numbers",
        choices=("adamw", "muon"),
    )
    lr_scale: Any = key(
        None,
        "Factors of the learning rate by kind of parameter, as {A_log: 0.1, embedding: 0.5}; kinds are the names in "
        "`grad_norm/KIND`.",
        fixes="numbers",
    )
    ema: float = key(
        0.0,
        "Decay, as 0.999, of an average of the weights over steps, which is validated beside them (`valid_loss_ema`), "
        "kept in checkpoints, exported and evaluated; 0 keeps none. Not under deepspeed.",
        fixes="numbers",
        least=0,
        below=1,
    )
    schedule: str = key(
        "cosine",
        "The learning rate after the warm-up. cosine, the published one, falls to `min_lr` at `steps`. wsd stays at "
        "`lr` and falls in the last `decay_steps`, as 1 - sqrt(share of them). constant stays. inverse_sqrt is `lr` "
        "times sqrt(warm-up / steps made).",
        fixes="numbers",
        choices=("cosine", "wsd", "constant", "inverse_sqrt"),
    )
    decay_steps: int | None = key(
        None,
        "wsd: steps in which the rate falls at the end; null is a tenth of `steps`, or with `decay_from` all that "
        "follow the checkpoint. A checkpoint is written where they begin, and kept.",
        fixes="numbers",
        least=1,
    )
    decay_from: str | None = key(
        None,
        "wsd: a checkpoint, as RUN/checkpoints/step-00001000, of a run under wsd or constant before its decay. The run "
        "begins there, with its weights, optimizer and samples to come, and goes on to `steps`, counted as there.",
        fixes="numbers",
    )
    init_from: str | None = key(
        None,
        "Weights that the run begins from, with a fresh optimizer, at its own context length, on its own species: a "
        "run, a checkpoint, an export, or any published folder or file (`python -m caduceus.hub show` says what it "
        "holds). The model's keys must be those of the weights. null begins from random ones of `seed`.",
        fixes="numbers",
    )
    warmup_steps: int | None = key(
        None, "Steps of linear warm-up from 1e-6; null is a tenth of `steps`.", fixes="numbers", least=0
    )
    warmup_tokens: int | None = key(
        None,
        "The same in bases: as many steps as take the first so many, whatever their batches.",
        fixes="numbers",
        least=0,
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
    keep_states: str = key(
        "none",
        "Blocks whose scans keep, for the backward pass, every eighth state and the outputs before their gate, which "
        "it would compute again: the same bits, twice the memory, a pass of the scan less; not measured on a GPU. "
        "By ops.backend=triton, for model.mixer=mamba, where ranks share no sequence by parallel.context. auto keeps "
        "them in as many blocks as the memory that is free at the start allows.",
        fixes="rounding",
        choices=("none", "all", "auto"),
    )
    cuda_graphs: str = key(
        "auto",
        "passes records the forward and the backward pass of a micro-batch as one CUDA graph, which is launched whole: "
        "for ranks with so little to compute that launching takes longer. On GPUs, by ops.backend=triton, under single "
        "and ddp, whose gradients are then exchanged at once after the last micro-batch. auto takes none, until a "
        "GPU has shown what is gained.",
        fixes="rounding",
        choices=("auto", "none", "passes"),
    )
    activation_checkpointing: str = key(
        "none",
        "What the backward pass recomputes of every block instead of keeping it: scan what feeds the scan "
        "(convolution, step sizes, B and C), nearly half of what is kept and soon made again; block all activations. "
        "auto takes scan in as few blocks as the memory that is free at the start demands, and where scan in all is "
        "not enough, block in as few as need it.",
        fixes="rounding",
        choices=("none", "scan", "block", "auto"),
    )
