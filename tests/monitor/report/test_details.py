"""Figures of what rows tell besides losses and rates."""

import json
from pathlib import Path

import numpy as np
import pytest

from caduceus.monitor.report.details import DETAILS
from caduceus.monitor.report.figures import LINE_BINS
from caduceus.monitor.report.reported import read_run
from tests.monitor.conftest import Watched


def run_of(path: Path, machines: list[dict[str, float]]) -> Watched:
    watched = Watched(path, mode="disabled")
    watched.go_on(1, len(machines) + 1)
    told = [json.dumps({"step": step, **row}) for step, row in enumerate(machines, start=1)]
    with watched.run.metrics_path.open("a") as file:
        file.writelines(f"{line}\n" for line in told)
    return watched


@pytest.mark.moderate
def test_lines_are_named_whichever_run_has_them_and_long_ones_marked_now_and_then(tmp_path: Path) -> None:
    used = np.random.default_rng(0).uniform(0, 100, 3 * LINE_BINS)
    runs = [
        run_of(tmp_path / "first", [{"cpu_percent/n1": 50.0}] * 3),
        run_of(tmp_path / "second", [{"cpu_percent/n2": value} for value in used]),
    ]
    (detail,) = (one for one in DETAILS if one.name == "processors")
    figure = detail.draw([read_run(watched.path) for watched in runs], "step")
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["n1", "n2", "first", "second"]
    short, long = (line for line in figure.axes[0].lines if len(line.get_xdata()))
    assert short.get_markevery() == 1
    marked = np.array(long.get_ydata())[:: long.get_markevery()]
    assert len(long.get_xdata()) == 2 * LINE_BINS and 40 <= len(marked) <= 80
    assert marked[::2].mean() < 40 and marked[1::2].mean() > 60  # least and greatest values take turns
