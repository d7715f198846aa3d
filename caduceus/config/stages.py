"""The stages of a run: lengths of sequences, batches and learning rates that follow each other. Imports no torch."""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from caduceus.config.train import StageConfig, TrainConfig
from caduceus.errors import UserError

_OF_DATA = ("seq_len", "mask_prob", "species_weights")
"""Keys of a stage that belong to the section `data`; the others belong to `train`."""
KEYS_OF_A_STAGE = tuple(field.name for field in fields(StageConfig))


@dataclass(frozen=True)
class Stage:
    """A stage of a run; a run without stages is a single one.

    number: from 1. run: the configuration of the run. config: the same with the stage's own values. Its `train.steps`
    are those of the stage, and its `train.seed` grows by one with each stage, so that each stage has its own order of
    samples.
    """

    number: int
    run: Any
    config: Any

    @property
    def is_last(self) -> bool:
        """Whether the run ends with this stage."""
        return self.number == max(1, len(self.run.train.stages))

    @property
    def bases_of_a_step(self) -> int:
        """Bases of an optimizer step, of all ranks together."""
        return self.config.train.global_batch * self.config.data.seq_len

    def values(self) -> dict[str, Any]:
        """The keys in which stages may differ, with their sections, and their values in this stage."""
        named = ((f"data.{name}" if name in _OF_DATA else f"train.{name}", name) for name in KEYS_OF_A_STAGE)
        return {key: getattr(getattr(self.config, key.partition(".")[0]), name) for key, name in named}


def stages_of(config: Any) -> list[Stage]:
    """The stages of a run's configuration (`Config`), in their order."""
    if not config.train.stages:
        return [Stage(1, config, config)]
    return [Stage(n, config, _config_of(config, stage, n)) for n, stage in enumerate(config.train.stages, start=1)]


@contextlib.contextmanager
def within(stage: Stage) -> Iterator[None]:
    """A context for checks of one stage: where the run has stages, a `UserError` in it names the stage."""
    try:
        yield
    except UserError as error:
        if not stage.run.train.stages:
            raise
        raise UserError(f"train.stages: stage {stage.number}: {error}") from None


def _config_of(config: Any, stage: StageConfig, number: int) -> Any:
    own = copy.deepcopy(config)
    own.train.seed += number - 1
    for name in KEYS_OF_A_STAGE:
        value = getattr(stage, name)
        if value is not None:
            setattr(own.data if name in _OF_DATA else own.train, name, value)
    return own


def steps_of_stages(train: TrainConfig) -> int:
    """Steps of all stages together. Raises `UserError` where a stage does not say how many it has."""
    steps = [stage.steps or 0 for stage in train.stages]
    if min(steps) < 1:
        number = 1 + steps.index(min(steps))
        raise UserError(f"train.stages: stage {number} has no steps; give some, such as {{seq_len: 1024, steps: 1000}}")
    return sum(steps)


def with_stages(known: DictConfig, values: DictConfig, origin: str) -> DictConfig:
    """The `values` of a layer as OmegaConf takes them: overrides of `train.stages` by number become the whole list.

    Raises `UserError` for an unknown key of a stage, or a number of no stage.
    """
    train = values.get("train")
    if not OmegaConf.is_dict(train) or "stages" not in train:
        return values
    stages: Any = train.stages
    if OmegaConf.is_config(stages):
        stages = OmegaConf.to_container(stages)
    if isinstance(stages, dict):
        former: Any = OmegaConf.to_container(known.train.stages)
        stages = _changed(former, stages, origin)
    for number, stage in enumerate(stages if isinstance(stages, list) else [], start=1):
        for name in stage if isinstance(stage, dict) else []:
            if name not in KEYS_OF_A_STAGE:
                raise UserError(
                    f"{origin}: unknown key 'train.stages.{number}.{name}'; known here: {', '.join(KEYS_OF_A_STAGE)}"
                )
    changed = copy.deepcopy(values)
    changed.train.stages = stages
    changed.train.setdefault("steps", TrainConfig.steps)  # which follow from the stages
    return changed


def _changed(stages: list[dict[str, Any]], by_number: dict[Any, Any], origin: str) -> list[dict[str, Any]]:
    for number, changes in by_number.items():
        if not str(number).isdigit() or not 1 <= int(number) <= len(stages) or not isinstance(changes, dict):
            there = f"1 to {len(stages)}" if stages else "none"
            raise UserError(
                f"{origin}: train.stages: change a stage by its number ({there}), such as train.stages.1.steps=1000"
            )
        stages[int(number) - 1].update(changes)
    return stages
