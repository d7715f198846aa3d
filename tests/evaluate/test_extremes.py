"""The worst and best windows of a validation, against a loop over all of its sequences."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from caduceus.alphabet import IGNORE_LABEL
from caduceus.data import ShardedGenome, build_validation
from caduceus.distributed.build import build_strategy
from caduceus.distributed.ranks import Ranks
from caduceus.evaluate.extremes import BINS, SequenceLosses, told_windows
from caduceus.evaluate.heldout import held_out_loss
from caduceus.monitor import windows as drawing
from caduceus.monitor.report.drawing import draw
from caduceus.train.optimizer import build_optimizer
from caduceus.train.trainer import train
from tests.train.conftest import SmallRun

CPU = torch.device("cpu")


@pytest.fixture
def small_run(small_shards: Path, tmp_path: Path) -> SmallRun:
    return SmallRun(small_shards, tmp_path)


def test_they_are_those_with_the_most_and_least_loss(small_run: SmallRun) -> None:
    config = small_run.config("run", data={"seq_len": 256}, valid={"samples": 14}, train={"precision": "fp64"})
    strategy = build_strategy(config, Ranks(0, 1, 1, CPU), build_optimizer)
    batches = build_validation(config)
    losses = SequenceLosses(batches)
    held_out_loss(strategy.model, batches, CPU, seen=lambda species, output: losses.add(species, output))
    told = told_windows(losses.extremes(strategy.ranks, 2), strategy, batches, config, iter)

    genome, sequences = ShardedGenome(small_run.shards), []
    for species, batch in batches:
        logits = strategy.model(batch.input_ids).logits.detach()
        for row, number in enumerate(batch.g.tolist()):
            labelled = batch.labels[row] != IGNORE_LABEL
            each = torch.full((256,), math.nan, dtype=torch.float64)
            each[labelled] = F.cross_entropy(logits[row, labelled], batch.labels[row, labelled], reduction="none")
            where = batches.describe(species, number) if number >= 0 else None
            sequences += (
                [(each.nanmean().item(), where, each.numpy(), logits[row, :, 7:11].softmax(-1))] if where else []
            )
    sequences.sort(key=lambda sequence: sequence[0])
    assert [(window["kind"], window["place"]) for window in told] == [
        ("worst", 1),
        ("worst", 2),
        ("best", 1),
        ("best", 2),
    ]
    for window, (loss, where, each, likely) in zip(told, [sequences[place] for place in (-1, -2, 0, 1)], strict=True):
        assert window["loss"] == pytest.approx(loss) and window["bases"] == 256
        assert {name: window[name] for name in where} == where
        place = np.arange(256) * BINS // 256
        bins = [each[place == at][~np.isnan(each[place == at])] for at in range(BINS)]
        expected = [float(values.mean()) if len(values) else None for values in bins]
        assert window["bins"]["loss"] == [value if value is None else pytest.approx(value) for value in expected]
        stretch = window["stretch"]
        first = stretch["start"] - where["start"]
        bases = genome.read("small", where["contig"], stretch["start"], stretch["start"] + 100).tobytes().decode()
        assert stretch["bases"] == bases.upper() and stretch["repeat"] == [int(base.islower()) for base in bases]
        assert stretch["labelled"] == (~np.isnan(each[first : first + 100])).astype(int).tolist()
        assert np.allclose(stretch["likelihood"], likely[first : first + 100], atol=1e-4)
        means = [np.nanmean(each[at : at + 100]) for at in range(157)]
        assert np.nanmean(each[first : first + 100]) == pytest.approx(
            max(means) if window["kind"] == "worst" else min(means)
        )


@pytest.mark.moderate
def test_a_run_keeps_and_draws_them_or_leaves_them_out(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing.Drawing, "keep", lambda self, step, windows: kept.append((step, windows)))
    kept: list = []
    train(small_run.config("off", train={"steps": 4}))
    assert kept == []
    monkeypatch.undo()
    config = small_run.config("on", train={"steps": 4}, monitor={"windows": 1})
    assert train(config) == 0
    folder = Path(config.run.dir) / "windows" / "step-00000004"
    names = {path.name for path in folder.iterdir()}
    assert names == {"windows.json", "drawn", "small-worst-1.png", "small-best-1.png"}
    for step in (8, 12, 16):
        later = drawing.folder_of(Path(config.run.dir), step)
        later.mkdir()
        (later / "windows.json").write_text(json.dumps(drawing.windows_of(Path(config.run.dir), 4)))
    draw(Path(config.run.dir), 16)
    assert [path.name for path in folder.iterdir()] == ["windows.json"] and len(list(later.glob("*.png"))) == 2


@pytest.mark.moderate
def test_windows_of_a_stream_have_no_coordinates_and_are_drawn(tmp_path: Path) -> None:
    bins = {"loss": [1.0, None], "repeat": [0.0, 1.0]}
    stretch = {
        "start": 3,
        "bases": "ACN",
        "labelled": [1, 0, 0],
        "repeat": [0, 1, 0],
        "likelihood": [[0.7, 0.1, 0.1, 0.1]] * 3,
    }
    window = {"species": "stream/1", "sample": 7, "kind": "worst", "place": 1, "bases": 8, "loss": 1.0, "accuracy": 1.0}
    drawing.folder_of(tmp_path, 5).mkdir(parents=True)
    (drawing.folder_of(tmp_path, 5) / "windows.json").write_text(
        json.dumps([{**window, "bins": bins, "stretch": stretch}])
    )
    draw(tmp_path, 5)
    assert (drawing.folder_of(tmp_path, 5) / "stream_1-worst-1.png").stat().st_size > 5000


def test_what_cannot_be_drawn_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "windows").write_text("in the way")
    made = drawing.Drawing(tmp_path)
    made.keep(1, [{"species": "a"}])
    made.end(wait=True)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
