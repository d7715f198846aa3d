"""Evaluations while a run trains: their numbers are the verb's on the checkpoint, and training's stay the same."""

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from caduceus.config import Config
from caduceus.errors import UserError
from caduceus.evaluate import in_loop
from caduceus.evaluate.labelled import LabelledTable
from caduceus.evaluate.model import Runner
from caduceus.evaluate.probe import probe
from caduceus.evaluate.scores import ScoreOptions
from caduceus.evaluate.variant_inputs import VariantSource
from caduceus.evaluate.variant_labels import Labels
from caduceus.evaluate.variants import score_file
from caduceus.hub import load
from caduceus.monitor.view import View
from caduceus.monitor.wandb.history import wandb_row
from caduceus.run.directory import RunDirectory
from caduceus.run.events import read_events
from caduceus.train.stopping import EXIT_REQUEUE
from caduceus.train.trainer import train
from tests.conftest import write_random_fasta
from tests.distributed.ranks import on_ranks
from tests.train.conftest import SmallRun, numbers


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`evaluations` of all verbs on small files, every other step."""
    folder, rng = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    write_random_fasta(folder / "genome.fa", 5, {"chr1": 600})
    text = "".join((folder / "genome.fa").read_text().upper().split("\n")[1:])
    rows = ["chrom\tpos\tref\talt\tclass"]
    rows += [f"chr1\t{p}\t{text[p - 1]}\t{'A' if text[p - 1] != 'A' else 'C'}\t{p % 2}" for p in range(100, 500, 9)]
    (folder / "variants.tsv").write_text("\n".join(rows))
    lines = ["sequence,label"]
    for label in (0, 1) * 12:
        lines.append(
            "".join(rng.choice(list("ACGT"), 30, p=[0.4, 0.1, 0.1, 0.4] if label else [0.25] * 4)) + f",{label}"
        )
    (folder / "labelled.csv").write_text("\n".join(lines))
    task = folder / "suite" / "tf" / "0"
    task.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        shutil.copy(folder / "labelled.csv", task / f"{split}.csv")
    table = str(folder / "labelled.csv")
    variants = {"input": str(folder / "variants.tsv"), "genome": str(folder / "genome.fa"), "label": "class"}
    given = {
        "clinvar": {"verb": "variants", **variants, "window": 32, "scores": ["masked", "embedding"]},
        "lines": {"verb": "probe", "train": table, "test": table, "layer": 1},
        "tuned": {"verb": "finetune", "train": table, "epochs": 1, "frozen": True, "baseline": "kmer"},
        "gue": {
            "verb": "suite",
            "suite": "gue",
            "data": str(folder / "suite"),
            "tasks": ["tf_0"],
            "seeds": 1,
            "epochs": 1,
            "lr": 1e-3,
        },
        "vectors": {"verb": "embed", "input": table},
        "more": {"verb": "heldout", "split": "train", "overrides": ["valid.samples=3"]},
    }
    return {name: {"every": 2, **one} for name, one in given.items()}


def config_of(run: SmallRun, name: str, evaluations: dict[str, Any], **sections: dict[str, Any]) -> Config:
    sections = {"model": {"n_layer": 2}, "train": {"steps": 4}, "checkpoint": {"every": 2, "keep": 0}, **sections}
    return run.config(name, evaluations=evaluations, **sections)


def weights(config: Config) -> dict[str, torch.Tensor]:
    return load(config.run.dir).state_dict()


def of_training(config: Config) -> list[dict[str, Any]]:
    return [row for row in numbers(config.run.dir) if "evaluated" not in row]


def evaluated(config: Config) -> dict[tuple[int, str], dict[str, Any]]:
    return {
        (row["step"], row["evaluated"]): row for row in RunDirectory(config.run.dir).metrics() if "evaluated" in row
    }


def assert_same_training(one: Config, other: Config) -> None:
    """Every number of every step and validation, all weights, and where the generators stand: the same bits."""
    assert of_training(one) == of_training(other)
    before, after = weights(one), weights(other)
    assert all(torch.equal(before[name], after[name]) for name in before)
    states = [
        torch.load(RunDirectory(config.run.dir).checkpoint_path(4) / "rng.pt", weights_only=False)
        for config in (one, other)
    ]
    assert states[0]["python"] == states[1]["python"] and torch.equal(states[0]["torch"], states[1]["torch"])
    assert all(np.array_equal(a, b) for a, b in zip(states[0]["numpy"], states[1]["numpy"], strict=True))


@pytest.mark.slow
def test_every_verb_runs_and_changes_no_bit_of_training(
    small_run: SmallRun, inputs: dict[str, Any], tmp_path: Path
) -> None:
    without, with_all = config_of(small_run, "without", {}), config_of(small_run, "with", inputs)
    assert train_anew(without) == 0 and train_anew(with_all) == 0
    assert_same_training(without, with_all)
    rows = evaluated(with_all)
    assert {name for _, name in rows} == set(inputs) and {step for step, _ in rows} == {2, 4}
    assert all(row[f"eval/{name}/seconds"] > 0 for (_, name), row in rows.items())
    run, one = RunDirectory(with_all.run.dir), inputs["clinvar"]
    runner = Runner(load(run.checkpoint_path(2)), "cpu")
    source, options = VariantSource(one["input"], one["genome"]), ScoreOptions(("masked", "embedding"), 32)
    areas = score_file(runner, source, tmp_path / "out.tsv", options, Labels("class")).areas
    assert {name: rows[2, "clinvar"][f"eval/clinvar/{name}"] for name in areas} == pytest.approx(areas, abs=1e-12)
    table = LabelledTable(inputs["lines"]["train"])
    found = probe(runner, {"train": table, "test": table}, tmp_path / "probe.json", in_loop.ProbeOptions(layer=1))
    assert rows[2, "lines"]["eval/lines/auroc"] == pytest.approx(found["metrics"]["test"]["auroc"], abs=1e-12)
    assert rows[4, "tuned"].keys() >= {"eval/tuned/mcc", "eval/tuned/kmer/auprc"}
    assert rows[4, "gue"]["eval/gue/mean"] == rows[4, "gue"]["eval/gue/tf_0"]
    assert rows[4, "more"]["eval/more/loss"] > 0.5
    assert {path.name for path in (run.path / "evaluations" / "vectors").iterdir()} == {
        "embeddings.npz",
        "embeddings.npz.json",
    }


def train_anew(config: Config) -> int:
    """Train from where generators of random numbers always stand."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    return train(config)


def train_on_ranks(rank: int, configs: list[Config]) -> list[int]:
    return [train_anew(config) for config in configs]


@pytest.mark.slow
def test_ranks_share_evaluations_and_train_as_without(small_run: SmallRun, inputs: dict[str, Any]) -> None:
    some = {name: inputs[name] for name in ("clinvar", "lines", "more", "tuned")}
    given = {
        "ddp": {"strategy": "ddp"},
        "fsdp": {"strategy": "fsdp"},
        "zero3": {"strategy": "deepspeed", "zero_stage": 3},
        "context": {"strategy": "ddp", "context": 2},
    }
    configs = {"without": config_of(small_run, "without", {}, parallel=given["ddp"])}
    configs |= {name: config_of(small_run, name, some, parallel=parallel) for name, parallel in given.items()}
    assert on_ranks(2, train_on_ranks, list(configs.values())) == [[0] * 5, [0] * 5]
    assert_same_training(configs["without"], configs["ddp"])
    alone = config_of(small_run, "alone", some)
    assert train(alone) == 0
    expected = evaluated(alone)
    for name in given:
        rows = evaluated(configs[name])
        assert rows.keys() == expected.keys(), name
        for key in ("eval/clinvar/auroc_llr", "eval/lines/auroc", "eval/more/loss"):
            step = 2, key.split("/")[1]
            assert rows[step][key] == pytest.approx(expected[step][key], abs=1e-5), (name, key)


@pytest.mark.moderate
def test_the_best_checkpoint_stays(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([0.3, 0.9, 0.5, 0.2, 0.95])
    monkeypatch.setattr(in_loop._HeldOut, "run", lambda self, runner, ranks: {"loss": next(values)})
    config = config_of(
        small_run,
        "best",
        {"more": {"verb": "heldout", "every": 1}},
        train={"steps": 4},
        valid={"every": 0},
        checkpoint={"every": 3, "keep": 1, "best": "eval/more/loss", "best_is": "max"},
    )
    assert train(config) == 0
    run = RunDirectory(config.run.dir)
    best = {"step": 2, "metric": "eval/more/loss", "is": "max", "value": 0.9}
    assert run.best() == best and (run.checkpoints_path / "best").resolve().name == "step-00000002"
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [2, 4]
    config.train.steps, config.run.allow_change = 5, ["train.steps"]
    assert train(config) == 0
    assert run.best() == {**best, "step": 5, "value": 0.95}
    (run.checkpoints_path / "best.json").unlink()  # as where a kill came between the checkpoint and it
    assert train(config) == 0
    assert run.best() == {**best, "step": 5, "value": 0.95}
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [5]


@pytest.mark.moderate
def test_an_evaluation_that_fails_costs_its_numbers(
    small_run: SmallRun, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(self: in_loop.InLoop, runner: Runner, ranks: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(in_loop._Variants, "run", fails)
    config = config_of(small_run, "failing", {name: inputs[name] for name in ("clinvar", "lines")})
    assert train(config) == 0
    assert {name for _, name in evaluated(config)} == {"lines"}
    assert "evaluations.clinvar: failed after step 2, and the run goes on without its numbers: OSError" in caplog.text
    told = [event for event in read_events(Path(config.run.dir)) if event["event"] == "evaluation failed"]
    assert [(event["step"], event["name"]) for event in told] == [(2, "clinvar"), (4, "clinvar")]


@pytest.mark.moderate
def test_a_stop_leaves_an_evaluation_for_the_next_start(
    small_run: SmallRun, inputs: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(small_run, "stopped", {"clinvar": inputs["clinvar"]})
    real = in_loop._Variants.run

    def stopped(self: in_loop.InLoop, runner: Runner, ranks: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return real(self, runner, ranks)

    monkeypatch.setattr(in_loop._Variants, "run", stopped)
    assert train(config) == EXIT_REQUEUE
    assert not evaluated(config) and "evaluations.clinvar: broken off after step 2" in caplog.text
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.undo()
    assert train(config) == 0
    assert set(evaluated(config)) == {(2, "clinvar"), (4, "clinvar")}


@pytest.mark.moderate
def test_mistakes_refuse_the_start_in_one_line(small_run: SmallRun, inputs: dict[str, Any]) -> None:
    clinvar, lines = inputs["clinvar"], inputs["lines"]
    for one, message in [
        ({**clinvar, "verb": "variant"}, r"evaluations\.x\.verb: choose one of heldout, .*; got variant"),
        ({**clinvar, "every": 0}, r"evaluations\.x\.every: give the steps between two evaluations, at least 1; got 0"),
        ({**clinvar, "windows": 9}, r"evaluations\.x: variants has no option 'windows'; it has input"),
        ({**clinvar, "out": "o"}, r"evaluations\.x\.out: the run itself sets this"),
        ({**clinvar, "window": "wide"}, r"evaluations\.x: --window: must be a whole number, got 'wide'"),
        ({**clinvar, "window": 1}, r"evaluations\.x: --window: must be at least 2"),
        ({**clinvar, "label": None}, r"evaluations\.x: numbers about variants need labels"),
        ({**clinvar, "label": "AF"}, r"evaluations\.x: .*no column 'AF' for the labels"),
        ({**clinvar, "input": "no.vcf"}, r"evaluations\.x: no\.vcf: no such file"),
        ({**lines, "layer": 7}, r"evaluations\.x: --layer: the model has 0"),
        ({"verb": "probe", "every": 1}, r"evaluations\.x: .*required: --train"),
        ({"verb": "heldout", "every": 1, "overrides": ["model.n_layer=1"]}, r"evaluations\.x: overrides: the model is"),
        ({"verb": "suite", "every": 1, "suite": "gue", "data": "no"}, r"evaluations\.x: --data: no is not a folder"),
        (
            {"verb": "suite", "every": 1, "suite": "gue", "data": "."},
            r"evaluations\.x: --data: \. has none of the tasks",
        ),
        (None, r"evaluations\.x: expected a mapping"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            train(config_of(small_run, "bad", {"x": one}))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"evaluations\.-x: a name has at most 40"):
        config_of(small_run, "bad", {"-x": clinvar})
    for best, message in [
        ({"best": "valid_loss"}, r"checkpoint\.best: say with checkpoint\.best_is=max or min"),
        ({"best_is": "max"}, r"checkpoint\.best_is: has no effect"),
        ({"best": "loss", "best_is": "min"}, r"checkpoint\.best: name a number of validations .* got 'loss'"),
        (
            {"best": "eval/y/mcc", "best_is": "max"},
            r"checkpoint\.best: 'eval/y/mcc' belongs to no evaluation; .* has x",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            config_of(small_run, "bad", {"x": lines}, checkpoint=best)
    with pytest.raises(UserError, match=r"checkpoint\.best: evaluations\.x gives no eval/x/r2, but eval/x/mcc"):
        train(config_of(small_run, "bad", {"x": lines}, checkpoint={"best": "eval/x/r2", "best_is": "max"}))
    assert not (small_run.directory / "bad").exists()


def test_the_time_of_evaluations_is_none_of_steps_and_they_have_a_space_in_wandb(tmp_path: Path) -> None:
    views = [View(RunDirectory(tmp_path), "run", 100, 0) for _ in range(2)]
    for step in range(1, 11):
        for view, pause in zip(views, (0, 50), strict=True):
            view.take({"step": step, "loss": 1.0, "seconds": 1.0, "tokens_per_second": 1.0}, step * (1.0 + pause))
            view.take({"step": step, "evaluated": "x", "eval/x/mcc": 0.5}, step * (1.0 + pause) + pause)
    assert views[0].seconds_left == views[1].seconds_left == 90.0
    row = {"step": 3, "evaluated": "x", "eval/x/auprc_llr": None, "eval/x/seconds": 2.0}
    assert json.dumps(wandb_row(row)) == '{"step": 3, "eval/x/auprc_llr": NaN, "eval/x/seconds": 2.0}'
