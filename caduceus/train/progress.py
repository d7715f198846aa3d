"""The progress of a run: what a checkpoint keeps besides the model and the optimizer."""

from dataclasses import dataclass, field, replace
from typing import Any

from caduceus.config import Config, TrainConfig
from caduceus.data.loader import TrainLoader
from caduceus.train.guards import Health
from caduceus.train.schedule import default_decay_start, default_warmup, in_steps, learning_rate


@dataclass
class Progress:
    """The progress of a run. `loader` is the loader's own state: {fingerprint, seed, samples_consumed}."""

    step: int
    tokens: int
    loader: dict[str, Any]
    warmup_steps: int | None = None
    """Steps in which the learning rate rises; None in a checkpoint of an older version."""
    health: Health = field(default_factory=Health)
    decay_start: int | None = None
    """The step of the stage after which the rate of `train.schedule=wsd` falls."""
    stage: int = 1
    """The number of the current stage of `train.stages`, from 1."""
    steps_before: int = 0
    """Steps of the earlier stages."""
    samples_before: int = 0
    """Samples of the earlier stages; the loader counts those of the current one."""

    @classmethod
    def first(cls, config: Config, loader: TrainLoader) -> "Progress":
        """The progress of a run, or of a stage, before its first step."""
        schedule = {"warmup_steps": default_warmup(in_steps(config)), "decay_start": default_decay_start(config.train)}
        return cls(step=0, tokens=0, loader=loader.state(), **schedule)

    @property
    def step_of_stage(self) -> int:
        """Steps that were made in the current stage."""
        return self.step - self.steps_before

    @property
    def samples(self) -> int:
        """Samples that the run has taken."""
        return self.samples_before + self.loader["samples_consumed"]

    def learning_rate(self, train: TrainConfig) -> float:
        """Learning rate of the next step; `train`: the keys of the current stage."""
        return learning_rate(self.step_of_stage + 1, train, self.warmup_steps, self.decay_start)

    def next_stage(self, config: Config, loader: TrainLoader) -> "Progress":
        """The progress at the beginning of the next stage, with its keys and loader. The running loss begins anew, as
        another sequence length has other losses.
        """
        return replace(
            Progress.first(config, loader),
            step=self.step,
            tokens=self.tokens,
            health=Health(skipped_steps=self.health.skipped_steps),
            stage=self.stage + 1,
            steps_before=self.step,
            samples_before=self.samples,
        )
