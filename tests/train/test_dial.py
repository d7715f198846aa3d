"""One dial: sizes and budgets to the keys of a run, and the table before it."""

import re
from pathlib import Path

import pytest

from caduceus.config import has_dial, load_config
from caduceus.config.dial import BASES_OF_A_BATCH, MATRICES, SIZES, parameters_of, turned
from caduceus.errors import UserError
from caduceus.model.costs import flops_per_base, parameter_count
from caduceus.train.__main__ import main as train_main
from caduceus.train.dial import dial_table
from caduceus.train.optimizer import build_optimizer
from launch.slurm import main


@pytest.mark.parametrize("size", SIZES)
def test_a_size_is_about_what_it_says_and_keeps_the_rules(size: str) -> None:
    config = load_config("auto", [f"size={size}", "data.path=x"])
    parameters = parameter_count(config.model)
    assert abs(parameters / parameters_of(size) - 1) < 0.05
    assert config.train.global_batch * config.data.seq_len == BASES_OF_A_BATCH
    assert config.train.steps == max(10_000, -(-100 * parameters_of(size) // BASES_OF_A_BATCH))
    assert config.train.lr_scale == dict.fromkeys(MATRICES, 256 / config.model.d_model)
    assert config.train.global_batch % config.train.micro_batch == 0
    counted = flops_per_base(config.model) / parameters
    assert counted == pytest.approx(12, rel=0.05), "what a budget is spent by"


def test_the_smallest_is_the_published_recipe() -> None:
    ours, published = load_config("auto", ["data.path=x"]), load_config("ps-131k", ["data.path=x"])
    for name in ("d_model", "n_layer", "rcps"):
        assert getattr(ours.model, name) == getattr(published.model, name)
    assert ours.train.lr == published.train.lr and set(ours.train.lr_scale.values()) == {1.0}
    assert ours.train.global_batch == published.train.global_batch


@pytest.mark.parametrize(
    ("compute", "size"), [(1e15, "8M"), (2e18, "8M"), (4e18, "30M"), (2e19, "90M"), (1.3e20, "300M"), (1e22, "300M")]
)
def test_a_budget_takes_the_largest_size_that_it_trains_and_is_spent(compute: float, size: str) -> None:
    keys = turned(None, compute, 1024)
    assert (keys["model"]["d_model"], keys["model"]["n_layer"]) == SIZES[size]
    spent = 12 * parameters_of(size) * BASES_OF_A_BATCH * keys["train"]["steps"]
    assert spent == pytest.approx(compute, rel=0.01) or keys["train"]["steps"] == 9 + (compute > 1e15)


@pytest.mark.moderate
def test_what_is_typed_wins_over_the_dial_and_the_dial_over_the_file(tmp_path: Path) -> None:
    config = load_config("auto", ["size=90M", "train.steps=7", "data.seq_len=1024", "data.path=x"])
    assert (config.model.d_model, config.train.steps, config.train.global_batch) == (768, 7, 1024)
    assert load_config("auto", ["compute=1.3e20", "data.path=x"]).model.d_model == 1024
    other = load_config("ps-1k", ["size=30M", "data.path=x"])
    assert (other.model.d_model, other.data.seq_len, other.train.global_batch) == (512, 1024, 1024)
    for given, message in (
        (["size=9M"], "size: choose one of 8M, 30M, 90M, 300M; got '9M'"),
        (["compute=-1"], "compute: FLOP of a run, a number above 0"),
        (["size=8M", "compute=1e19"], "compute: decides the size"),
    ):
        with pytest.raises(UserError, match=message):
            load_config("auto", given)


@pytest.mark.moderate
def test_rates_scale_by_kinds_that_models_have() -> None:
    from caduceus import CaduceusConfig, CaduceusForMaskedLM

    for mixer in ({"rcps": True}, {"rcps": False, "bidirectional_weight_tie": False}):
        config = load_config("auto", ["size=30M", "data.path=x"])
        model = CaduceusForMaskedLM(CaduceusConfig(d_model=8, n_layer=1, **mixer), "cpu")
        groups = build_optimizer(model, config.train).param_groups
        assert {group.get("lr_scale", 1) for group in groups} == {1, 0.5}


@pytest.mark.moderate
def test_the_table_stands_before_the_run(monkeypatch, capsys) -> None:
    words = ["--dry-run", "--config", "auto", "size=300M", "data.path=x", "--nodes", "2", "--gpus-per-node", "8"]
    monkeypatch.setattr("sys.argv", ["slurm.py", *words])
    assert main() == 0
    printed = capsys.readouterr().out
    assert printed.startswith("# 302,825,472 parameters: model.d_model=1024, model.n_layer=43")
    assert re.search(r"of matrices 0\.002\n# unmeasured estimates for 16 GPUs:\n#   A100 .* fits", printed)
    config = load_config("auto", ["size=300M", "data.path=x"])
    assert dial_table(config, 16) in printed
    seconds = {gpu: float(found) for gpu, found in re.findall(r"#   (\w+) +([\d.]+) s a step", printed)}
    assert seconds["H100"] == seconds["H200"] < seconds["A100"] < seconds["L40S"]
    assert has_dial("ps-1k", ["size=8M"]) and not has_dial("ps-1k", ["train.steps=8"])


def test_training_shows_the_table_too(tmp_path: Path, monkeypatch, capsys) -> None:
    own = tmp_path / "mine" / "own.yaml"
    own.parent.mkdir()
    own.write_text("size: 30M\ndata:\n  path: x\n  seq_len: 1024\n")
    monkeypatch.setattr("sys.argv", ["train", "--show", "--config", str(own)])
    assert train_main() == 0
    assert capsys.readouterr().out.startswith(dial_table(load_config(own), 1) + "\n# The model.")
