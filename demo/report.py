"""The demo's results: a table of losses and a picture of the loss curve."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from rich.table import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SMOOTHING = 100
"""Number of steps over which the training loss is averaged in the picture."""


@dataclass(frozen=True)
class Row:
    """A predictor, the part of the input that it sees, and its mean loss over the labelled bases in nats."""

    name: str
    sees: str
    loss: float


def loss_table(baselines: Sequence[Row], model: Row, caption: str) -> Table:
    """A table of every predictor with its loss, and the model's difference to it."""
    view = Table(title="Validation loss, nats per labelled base", caption=caption, caption_justify="left")
    view.add_column("predictor")
    view.add_column("sees")
    view.add_column("loss", justify="right")
    view.add_column("model minus it", justify="right")
    best = min(baselines, key=lambda row: row.loss)
    for row in baselines:
        difference = f"{model.loss - row.loss:+.4f}"
        view.add_row(row.name, row.sees, f"{row.loss:.4f}", difference, style="bold" if row is best else None)
    view.add_section()
    view.add_row(model.name, model.sees, f"{model.loss:.4f}", "", style="bold")
    return view


def plot_losses(metrics: Sequence[dict], baselines: Sequence[Row], path: Path) -> None:
    """Draw training and validation loss against bases seen as a PNG, with the baselines as horizontal lines.

    `metrics` are the rows of a run's metrics.jsonl.
    """
    training = [row for row in metrics if "loss" in row]
    validation = [row for row in metrics if "valid_loss" in row]
    bases_at = {row["step"]: row["tokens"] / 1e6 for row in training}
    x = np.array([bases_at[row["step"]] for row in training])
    loss = np.array([row["loss"] for row in training])

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    axes.plot(x, loss, color="tab:blue", alpha=0.2, linewidth=0.7)
    width = min(SMOOTHING, 1 + len(loss) // 4)
    mean = np.convolve(loss, np.ones(width) / width, "valid")
    axes.plot(x[width - 1 :], mean, color="tab:blue", label=f"training, mean of {width} steps")
    axes.plot(
        [bases_at[row["step"]] for row in validation],
        [row["valid_loss"] for row in validation],
        color="tab:orange",
        marker="o",
        label="validation: a species that the training never sees",
    )
    for row in baselines:
        axes.axhline(row.loss, color="grey", linestyle="--", linewidth=1)
        axes.annotate(
            fill(row.name, 14),
            (1, row.loss),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
        )
    shown = [*mean, *(row["valid_loss"] for row in validation), *(row.loss for row in baselines)]
    # The first steps, before even the base composition is learnt, would flatten everything that matters.
    axes.set_ylim(min(shown) - 0.02, max(row.loss for row in baselines) + 0.05)
    axes.set_xlabel("bases seen in training (millions)")
    axes.set_ylabel("loss (nats per labelled base)")
    axes.set_title("Caduceus-PS on six fruit-fly chromosomes")
    axes.legend(loc="upper right", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
