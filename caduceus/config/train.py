"""The keys of `train.`: the optimization. Imports no torch."""

from dataclasses import dataclass
from typing import Any

from caduceus.config.keys import key


@dataclass(repr=False)
class StageConfig:
    """The keys of a stage of a run. None means the value of the run."""

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
        "Optimizer steps of the run; with `stages`, of all stages. Under cosine and wsd the learning rate reaches its "
        "end at the last step.",
        fixes="numbers",
        least=1,
    )
    stages: list[StageConfig] = key(
        [],
        "Stages that the run goes through: a list of {seq_len, global_batch, micro_batch, steps, lr, min_lr, "
        "schedule, warmup_steps, decay_steps, batch_ramp, mask_prob, species_weights}. A stage gives `steps`, and "
        "whatever differs from the run's keys. Each stage has the learning rate and samples of a run of its own; "
        "weights and the optimizer's state go on. `train.stages.2.steps=N` changes one.",
        fixes="numbers",
    )
    global_batch: int = key(8, "Sequences per optimizer step, over all ranks.", fixes="order", least=1)
    batch_ramp: Any = key(
        None,
        "Smaller global batches at the beginning, such as [[0, 64], [500, 128], [1500, 256]]: pairs of steps made and "
        "sequences per step from then on. The last number is `global_batch`. Not under deepspeed.",
        fixes="order",
    )
    micro_batch: int = key(
        8,
        "Sequences per forward and backward pass on a rank. The number of passes in a step follows from it.",
        fixes="rounding",
        least=1,
    )
    lr: float = key(8e-3, "Largest learning rate, at the end of the warm-up.", fixes="numbers", least=0)
    min_lr: float = key(
        1e-4,
        "Learning rate at the end of cosine and wsd, and the lowest rate of inverse_sqrt.",
        fixes="numbers",
        least=0,
    )
    optimizer: str = key(
        "adamw",
        "muon is torch's Muon for in_proj, x_proj and out_proj, with a matrix for each direction and updates of "
        "AdamW's size; all other parameters have AdamW. Under single and ddp only.",
        fixes="numbers",
        choices=("adamw", "muon"),
    )
    lr_scale: Any = key(
        None,
        "Factors of the learning rate by kind of parameter, such as {A_log: 0.1, embedding: 0.5}. Kinds are the names "
        "in `grad_norm/KIND`.",
        fixes="numbers",
    )
    ema: float = key(
        0.0,
        "Decay, such as 0.999, of an average of the weights over steps. The average is validated too "
        "(`valid_loss_ema`), is kept in checkpoints, and is what exports and evaluations take. 0 keeps none. Not "
        "under deepspeed.",
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
        "wsd: number of steps at the end in which the rate falls. null is a tenth of `steps`; with `decay_from` it is "
        "all steps after the checkpoint. A checkpoint is written where the fall begins, and kept.",
        fixes="numbers",
        least=1,
    )
    decay_from: str | None = key(
        None,
        "wsd: a checkpoint, such as RUN/checkpoints/step-00001000, of a run under wsd or constant before its decay. "
        "The run begins there, with its weights, its optimizer and the samples that follow, and goes on to `steps`, "
        "which count from the beginning of the other run.",
        fixes="numbers",
    )
    init_from: str | None = key(
        None,
        "Weights from which the run begins, with a fresh optimizer, its own context length and its own species: a "
        "run, a checkpoint, an export, or any published folder or file (`python -m caduceus.hub show` says what it "
        "holds). The model's keys must be those of the weights. null begins from random weights by `seed`.",
        fixes="numbers",
    )
    warmup_steps: int | None = key(
        None, "Steps of linear warm-up from 1e-6; null is a tenth of `steps`.", fixes="numbers", least=0
    )
    warmup_tokens: int | None = key(
        None,
        "The warm-up in bases instead of steps: it lasts until so many bases were seen, with any batch sizes.",
        fixes="numbers",
        least=0,
    )
    weight_decay: float = key(
        0.1, "AdamW's weight decay. It is not applied to biases, norms, A_log and D.", fixes="numbers", least=0
    )
    betas: list[float] = key(
        [0.9, 0.95], "Decay of AdamW's two moments from step to step.", fixes="numbers", least=0, below=1
    )
    clip_norm: float = key(1.0, "Largest global norm of the gradient; 0 turns clipping off.", fixes="numbers", least=0)
    max_skipped_steps: int = key(
        10,
        "How many steps in a row may have a loss or gradient that is NaN or infinite; one more ends the run. Such "
        "steps are always skipped, so this decides whether a run goes on, not what it computes.",
        fixes="nothing",
        least=0,
    )
    spike_factor: float = key(
        0.0,
        "A loss above this many times its running mean sends the run back to its newest checkpoint. It goes on there "
        "with the samples after the spike. 0 never does this. It decides which updates are made.",
        fixes="numbers",
        least=0,
    )
    stall_minutes: float = key(
        15.0,
        "A step, or a batch of a validation, that takes longer counts as hung: every rank writes its stacks to the "
        "run's logs and ends. The start and a checkpoint may take two hours. 0 waits without a limit.",
        fixes="nothing",
        least=0,
    )
    seed: int = key(0, "Seed of the first weights, the order of samples, strands and masks.", fixes="order", least=0)
    precision: str = key(
        "fp32",
        "bf16 is autocast: parameters and the scan's state stay fp32. fp64 computes everything in double precision, "
        "to verify numerics; on a GPU it needs ops.backend=naive, which is slow.",
        fixes="numbers",
        choices=("fp32", "bf16", "fp64"),
    )
    deterministic: bool = key(
        False,
        "Give the same bits in every run on the same layout and machines, at some cost of speed on GPUs.",
        fixes="rounding",
    )
    compile: bool = key(False, "Compile every block with torch.compile.", fixes="rounding")
    keep_states: str = key(
        "none",
        "In which blocks the scan keeps, for the backward pass, every eighth state and the outputs before their gate, "
        "which it would otherwise compute again. The bits are the same; it takes twice the memory and a pass of the "
        "scan less. The time was not measured on a GPU. It works with ops.backend=triton and model.mixer=mamba, "
        "without parallel.context. auto keeps them in as many blocks as the memory that is free at the start allows.",
        fixes="rounding",
        choices=("none", "all", "auto"),
    )
    cuda_graphs: str = key(
        "auto",
        "passes records the forward and the backward pass of a micro-batch as one CUDA graph, which is launched as a "
        "whole. It is for ranks that have so little to compute that launching takes longer. It needs a GPU, "
        "ops.backend=triton, and single or ddp, whose gradients are then exchanged at once after the last "
        "micro-batch. auto takes none, because it has not run on a GPU.",
        fixes="rounding",
        choices=("auto", "none", "passes"),
    )
    activation_checkpointing: str = key(
        "none",
        "What the backward pass recomputes in every block instead of keeping it. scan: what feeds the scan "
        "(convolution, step sizes, B and C), which is nearly half of the memory and is quickly computed again. block: "
        "all activations. auto takes scan in as few blocks as the free memory at the start demands; if scan in all "
        "blocks is not enough, it takes block in as few as needed.",
        fixes="rounding",
        choices=("none", "scan", "block", "auto"),
    )
