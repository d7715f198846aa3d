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
        "Optimizer steps of the run; with `stages`, of all stages together. Under cosine and wsd the learning rate "
        "reaches its final value at the last step.",
        fixes="numbers",
        least=1,
    )
    stages: list[StageConfig] = key(
        [],
        "Stages that the run goes through, a list of {seq_len, global_batch, micro_batch, steps, lr, min_lr, "
        "schedule, warmup_steps, decay_steps, batch_ramp, mask_prob, species_weights}: `steps`, and the keys that "
        "differ from those of the run. Each stage has the learning rates and samples of a run of its own; weights "
        "and the optimizer's state are carried over. `train.stages.2.steps=N` changes one.",
        fixes="numbers",
    )
    global_batch: int = key(8, "Sequences per optimizer step, over all ranks.", fixes="order", least=1)
    batch_ramp: Any = key(
        None,
        "Smaller global batches at the beginning, such as [[0, 64], [500, 128], [1500, 256]]: after so many steps, "
        "so many sequences per step; the last is `global_batch`. Not under deepspeed.",
        fixes="order",
    )
    micro_batch: int = key(
        8,
        "Sequences per forward and backward pass on a rank; gradients are accumulated over as many passes as the "
        "global batch needs.",
        fixes="rounding",
        least=1,
    )
    lr: float = key(8e-3, "Largest learning rate, at the end of the warm-up.", fixes="numbers", least=0)
    min_lr: float = key(
        1e-4, "Learning rate at the end of cosine and wsd, and the least of inverse_sqrt.", fixes="numbers", least=0
    )
    optimizer: str = key(
        "adamw",
        "muon: torch's Muon for in_proj, x_proj and out_proj, with a separate matrix per direction, and updates "
        "scaled to the size of AdamW's; AdamW for the other parameters. Under single and ddp.",
        fixes="numbers",
        choices=("adamw", "muon"),
    )
    lr_scale: Any = key(
        None,
        "Factors of the learning rate by kind of parameter, such as {A_log: 0.1, embedding: 0.5}; kinds are the "
        "names in `grad_norm/KIND`.",
        fixes="numbers",
    )
    ema: float = key(
        0.0,
        "Decay, such as 0.999, of a moving average of the weights over steps. The average is validated beside the "
        "weights (`valid_loss_ema`), kept in checkpoints, exported and evaluated; 0 keeps none. Not under deepspeed.",
        fixes="numbers",
        least=0,
        below=1,
    )
    schedule: str = key(
        "cosine",
        "The learning rate after the warm-up. cosine, the published one, falls to `min_lr` at `steps`. wsd stays at "
        "`lr`, and in the last `decay_steps` falls as 1 - sqrt(share of them made). constant stays at `lr`. "
        "inverse_sqrt is `lr` times sqrt(warm-up / steps made).",
        fixes="numbers",
        choices=("cosine", "wsd", "constant", "inverse_sqrt"),
    )
    decay_steps: int | None = key(
        None,
        "wsd: the last steps, in which the rate falls; null is a tenth of `steps`, or with `decay_from` all steps "
        "after the checkpoint. A checkpoint is written where they begin, and kept.",
        fixes="numbers",
        least=1,
    )
    decay_from: str | None = key(
        None,
        "wsd: a checkpoint, such as RUN/checkpoints/step-00001000, of a run under wsd or constant, from before its "
        "decay. The new run begins at that step, with the checkpoint's weights, optimizer and place in the order of "
        "samples, and goes on to `steps`, which count from the beginning of the first run.",
        fixes="numbers",
    )
    init_from: str | None = key(
        None,
        "Weights that the run begins from: a run, a checkpoint, an export, or any published folder or file (`python "
        "-m caduceus.hub show` says what it holds). The optimizer is new, and context length and species are this "
        "run's own. The model's keys must be those of the weights. null begins from random weights, drawn with "
        "`seed`.",
        fixes="numbers",
    )
    warmup_steps: int | None = key(
        None, "Steps of linear warm-up from 1e-6; null is a tenth of `steps`.", fixes="numbers", least=0
    )
    warmup_tokens: int | None = key(
        None,
        "The warm-up in bases, instead of `warmup_steps`: as many steps as these bases take, whatever the batch size.",
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
        "How many steps in a row may have a NaN or infinite loss or gradient; one more ends the run. Such steps are "
        "always skipped: the key decides whether a run goes on, not what it computes.",
        fixes="nothing",
        least=0,
    )
    spike_factor: float = key(
        0.0,
        "A loss above this many times its running mean rewinds the run to its newest checkpoint, where it goes on "
        "with the samples that follow the spike; 0 never rewinds. The key decides which updates are made.",
        fixes="numbers",
        least=0,
    )
    stall_minutes: float = key(
        15.0,
        "A step, or a batch of a validation, that takes longer than this counts as hung: every rank writes its stack "
        "traces to the run's logs and ends. The start and a checkpoint may take two hours. 0 waits without limit.",
        fixes="nothing",
        least=0,
    )
    seed: int = key(
        0, "Seed of the initial parameters, the order of samples, strands and masks.", fixes="order", least=0
    )
    precision: str = key(
        "fp32",
        "bf16 uses autocast: parameters and the scan's state stay fp32. fp64 computes everything in double "
        "precision, to verify numerics; on a GPU with the slow ops.backend=naive.",
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
        "Number of blocks whose scans keep every eighth state and the outputs before their gate for the backward "
        "pass, which otherwise computes them again: the same bits, twice the memory, and one pass of the scan less. "
        "Not measured on a GPU. With ops.backend=triton and model.mixer=mamba, without parallel.context. auto takes "
        "as many blocks as the memory that is free at the start allows.",
        fixes="rounding",
        choices=("none", "all", "auto"),
    )
    cuda_graphs: str = key(
        "auto",
        "passes records the forward and the backward pass of a micro-batch as one CUDA graph, which is launched as a "
        "whole: for ranks with so little to compute that launching kernels takes longer. On GPUs, with "
        "ops.backend=triton, under single and ddp; ddp then exchanges all gradients together after the last "
        "micro-batch. auto takes none, as the gain has not been measured on a GPU.",
        fixes="rounding",
        choices=("auto", "none", "passes"),
    )
    activation_checkpointing: str = key(
        "none",
        "What the backward pass recomputes in every block instead of keeping it. scan: the inputs of the scan "
        "(convolution, step sizes, B and C), nearly half of the memory and cheap to recompute. block: all "
        "activations. auto takes scan in as few blocks as the free memory at the start requires, and where scan in "
        "all blocks is not enough, block in as few as necessary.",
        fixes="rounding",
        choices=("none", "scan", "block", "auto"),
    )
