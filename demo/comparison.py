"""Reports a comparison: all runs, the spread over seeds, differences of the arms, and curves."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

from caduceus.model.costs import parameter_count
from caduceus.run.directory import RunDirectory

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@dataclass(frozen=True)
class Arm:
    """An arm of a comparison: overrides for the demo's configuration, and the published preset with overrides."""

    name: str
    small: list[str]
    published: list[str]


@dataclass(frozen=True)
class Outcome:
    """A finished run of an arm. `curve`: (bases seen, validation loss) at each validation."""

    arm: str
    seed: int
    parameters: int
    objective: str
    curve: list[tuple[int, float]]

    @classmethod
    def of(cls, arm: str, seed: int, path: Path) -> "Outcome":
        """The outcome of the run in a directory."""
        run = RunDirectory.open(path)
        config, rows = run.config(), run.metrics()
        bases = {row["step"]: row["tokens"] for row in rows if "tokens" in row}
        curve = [(bases[row["step"]], row["valid_loss"]) for row in rows if "valid_loss" in row]
        return cls(arm, seed, parameter_count(config.model), config.data.objective, curve)

    @property
    def loss(self) -> float:
        """Validation loss at the end, in nats per labelled base."""
        return self.curve[-1][1]


def report(name: str, outcomes: Sequence[Outcome], tokens: int) -> str:
    """The comparison as Markdown: every arm, its difference from the first arm by seed, and every run."""
    arms = {arm: [one for one in outcomes if one.arm == arm] for arm in dict.fromkeys(one.arm for one in outcomes)}
    first = next(iter(arms))
    lines = [f"## {name}: {tokens:,} bases a run, {len(arms[first])} seeds", ""]
    lines += ["| arm | parameters | valid loss, mean | deviation over seeds | minus the first, by seed |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for arm, runs in arms.items():
        losses = [run.loss for run in runs]
        comparable = runs[0].objective == arms[first][0].objective
        differences = [run.loss - other.loss for run, other in zip(runs, arms[first], strict=True)]
        against = "" if arm == first else spread(differences) if comparable else "another task"
        deviation = f"{statistics.stdev(losses):.4f}" if len(losses) > 1 else "-"
        lines.append(f"| {arm} | {runs[0].parameters:,} | {statistics.fmean(losses):.4f} | {deviation} | {against} |")
    lines += ["", "All runs:", "", "| arm | seed | valid loss at the end |", "|---|---:|---:|"]
    lines += [f"| {run.arm} | {run.seed} | {run.loss:.4f} |" for run in outcomes]
    return "\n".join([*lines, ""])


def spread(differences: Sequence[float]) -> str:
    """Mean and deviation of differences, and how many are above 0, as text."""
    mean = statistics.fmean(differences)
    deviation = f" ± {statistics.stdev(differences):.4f}" if len(differences) > 1 else ""
    return f"{mean:+.4f}{deviation}, above 0 in {sum(value > 0 for value in differences)} of {len(differences)}"


def draw(name: str, outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw validation loss against bases seen as a PNG, with a thin line per run and a thick one per arm."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for number, arm in enumerate(dict.fromkeys(one.arm for one in outcomes)):
        curves = [one.curve for one in outcomes if one.arm == arm]
        for curve in curves:
            axes.plot(*zip(*curve, strict=True), color=f"C{number}", alpha=0.3, linewidth=0.8)
        means = [(points[0][0], statistics.fmean(loss for _, loss in points)) for points in zip(*curves, strict=False)]
        axes.plot(*zip(*means, strict=True), color=f"C{number}", marker="o", label=arm)
    axes.set_xlabel("bases seen in training")
    axes.set_ylabel("validation loss (nats per labelled base)")
    axes.set_title(name)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
