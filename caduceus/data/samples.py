"""Where samples lie: the g-th sample of training, and the fixed samples of validation. Imports no torch."""

import hashlib
from collections.abc import Callable

import numpy as np

from caduceus.config import Config
from caduceus.config.by_step import BatchRamp, factors_by_step, points_of, share
from caduceus.data.epochs import Epochs, EqualEpochs, ShiftedEpochs
from caduceus.data.order import Purpose, StagedMixture, key, permute
from caduceus.data.split_sources import SplitSources
from caduceus.errors import UserError

SAMPLE_DTYPE = np.dtype(
    [
        ("g", "<i8"),  # sample number
        ("window", "<i8"),  # row of the crop table's windows
        ("begin", "<i8"),  # first base of the crop in its window, on the forward strand
        ("strand", "u1"),  # the strand that the sample shows: 0 is +, 1 is -
        ("mask_key", "<u8"),
    ]
)


class TrainingOrder:
    """The endless sequence of training samples: a pure function of the sources, the seed and the sample number."""

    def __init__(self, split_sources: SplitSources, config: Config) -> None:
        data, seed = config.data, config.train.seed
        self._seed = seed
        self._both_strands = resolve_strands(config) == "both"
        self.mixture = StagedMixture(_stages_of_mixture(split_sources, config), seed)
        kind = ShiftedEpochs if data.crop_offset == "random" else EqualEpochs
        self.epochs: Epochs = kind(split_sources.crops, seed, data.shuffle_block)

    def locate(self, g: np.ndarray) -> np.ndarray:
        """Samples g (n,) int64 -> (n,) SAMPLE_DTYPE."""
        source, k = self.mixture.locate(g)
        return self._samples(g, self.epochs.locate(source, k))

    def substitute(self, g: int, attempt: int) -> np.ndarray:
        """The `attempt`-th substitute for sample g, which cannot be read: (1,) SAMPLE_DTYPE, of the same source."""
        number = np.array([g])
        source, _ = self.mixture.locate(number)
        draw = key(self._seed, Purpose.SUBSTITUTE, number, attempt)
        return self._samples(number, self.epochs.draw(source, draw))

    def _samples(self, g: np.ndarray, places: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        samples = np.empty(len(g), SAMPLE_DTYPE)
        samples["g"] = g
        samples["window"], samples["begin"] = places
        samples["strand"] = key(self._seed, Purpose.STRAND, g) >> np.uint64(63) if self._both_strands else 0
        samples["mask_key"] = key(self._seed, Purpose.MASK, g)
        return samples


def _stages_of_mixture(split_sources: SplitSources, config: Config) -> list[tuple[int, list[float]]]:
    """(first sample, weight of each source) of the stages of `data.species_weights`."""
    ramp, stages = BatchRamp.of(config.train), []
    species = [source.species for source in split_sources.sources]
    for step, factors in factors_by_step(config.data):
        for name in factors:
            if name not in species:
                raise UserError(
                    f"data.species_weights: no species '{name}' in data.path; there are {', '.join(species)}"
                )
        weights = [source.weight * factors.get(source.species, 1) for source in split_sources.sources]
        if not any(weights):
            raise UserError(f"data.species_weights: from step {step} on all species have 0; give at least one a weight")
        stages.append((ramp.samples_before(step), weights))
    return stages


def mask_rates(config: Config) -> Callable[[np.ndarray], np.ndarray] | None:
    """A function: sample numbers (n,) -> share of bases to label (n,); None without `data.mask_schedule`.

    It is linear between the steps of the schedule, and the same for all samples of a step.
    """
    if config.data.mask_schedule is None:
        return None
    points = points_of("data.mask_schedule", config.data.mask_schedule, share)
    ramp, (steps, rates) = BatchRamp.of(config.train), zip(*points, strict=True)

    def rates_of(g: np.ndarray) -> np.ndarray:
        return np.interp([ramp.steps_before(number) for number in g.tolist()], steps, rates)

    return rates_of


def resolve_strands(config: Config) -> str:
    """`data.strands` with auto resolved: forward where the model sees both strands by itself, both otherwise."""
    if config.data.strands == "auto":
        return "forward" if config.model.rcps else "both"
    return config.data.strands


def validation_samples(split_sources: SplitSources, limit: int) -> dict[str, np.ndarray]:
    """At most `limit` samples of each species, (n,) SAMPLE_DTYPE, forward strand.

    Choice and masks depend on the genome and the place of the crop alone, so every run has the same samples.
    """
    crops = split_sources.crops
    sizes = crops.crops_of_source
    chosen = {}
    for source, first, size in zip(split_sources.sources, np.cumsum(sizes) - sizes, sizes, strict=True):
        count = min(limit, int(size))
        draw = key(Purpose.VALIDATION, _name_key(source.species, source.sha256))
        samples = np.zeros(count, SAMPLE_DTYPE)
        samples["g"] = np.arange(count)
        numbers = first + np.sort(permute(np.arange(count), int(size), draw))
        samples["window"], samples["begin"] = crops.locate(numbers)
        windows = crops.windows[samples["window"]]
        contigs = np.array([_name_key(source.species, contig) for contig in source.table.contigs], np.uint64)
        start = windows["start"] + crops.first_bases(samples["window"], samples["begin"]).astype(np.uint64)
        samples["mask_key"] = key(Purpose.MASK, contigs[windows["contig"]], start)
        chosen[source.species] = samples
    return chosen


def _name_key(*names: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(names).encode()).digest()[:8], "little")
