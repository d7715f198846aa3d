"""Runs that begin from weights, and exports that a run makes while it trains."""

import shutil
from pathlib import Path

import pytest
import torch

from caduceus import hub
from caduceus.config import Config
from caduceus.data import build_loader
from caduceus.errors import UserError
from caduceus.run.directory import RunDirectory
from caduceus.train.trainer import train
from tests.distributed.layouts import LAYOUTS, config_of, train_all
from tests.model.golden import Golden, load_golden
from tests.train.conftest import SmallRun, numbers

MODEL_KEYS = ("d_model", "n_layer", "vocab_size", "d_state", "headdim", "mixer", "rcps", "residual_in_fp32")


def published(name: str, folder: Path) -> Golden:
    golden = load_golden(name)
    hub.save_published(hub.from_published(golden.config, golden.part("state")), folder)
    return golden


def of_model(folder: Path) -> dict:
    config = hub.load(folder).config
    return {key: getattr(config, key) for key in MODEL_KEYS}


def first_loss(config: Config, folder: Path) -> float:
    model, batches = hub.load(folder), build_loader(config)
    with torch.no_grad():
        outputs = [model(b.input_ids, b.labels) for b, _ in zip(batches, range(batches.per_step), strict=False)]
    return (sum(o.loss_sum.sum() for o in outputs) / sum(o.weight_sum.sum() for o in outputs)).item()


@pytest.mark.moderate
@pytest.mark.parametrize("name", ["plantcad1_ps_fused", "ps_mamba2_fused"])
def test_a_run_begins_at_the_loss_of_the_weights(small_run: SmallRun, tmp_path: Path, name: str) -> None:
    published(name, tmp_path / "golden")
    keys = of_model(tmp_path / "golden")
    config = small_run.config(
        "run", model=keys, train={"steps": 2, "init_from": str(tmp_path / "golden"), "lr": 1e-3}, valid={"every": 0}
    )
    assert train(config) == 0
    assert numbers(config.run.dir)[0]["loss"] == pytest.approx(first_loss(config, tmp_path / "golden"), rel=1e-5)


@pytest.mark.moderate
def test_another_run_goes_on_at_another_length_and_needs_the_weights_no_more(
    small_run: SmallRun, tmp_path: Path
) -> None:
    first = small_run.config("first", train={"steps": 4}, valid={"every": 0})
    assert train(first) == 0
    keys = {"steps": 6, "init_from": first.run.dir, "global_batch": 4}
    whole, halved = (
        small_run.config(name, data={"seq_len": 256}, train=keys, valid={"every": 0}, checkpoint={"every": 3})
        for name in ("whole", "halved")
    )
    assert train(whole) == 0
    assert numbers(whole.run.dir)[0]["loss"] == pytest.approx(first_loss(whole, Path(first.run.dir)), rel=1e-5)

    assert train(halved) == 0
    shutil.rmtree(RunDirectory(halved.run.dir).checkpoint_path(6))
    shutil.rmtree(first.run.dir)
    assert train(halved) == 0  # from its checkpoint of step 3
    assert numbers(halved.run.dir) == numbers(whole.run.dir)


@pytest.mark.moderate
def test_weights_of_another_model_are_refused_by_name_before_anything_is_written(
    small_run: SmallRun, tmp_path: Path
) -> None:
    published("plantcad1_ps_fused", tmp_path / "golden")
    keys = of_model(tmp_path / "golden")
    cases = (
        ({**keys, "d_model": 32}, str(tmp_path / "golden"), r"model.d_model=24, not 32; give model.d_model=24"),
        ({**keys, "rcps": False}, str(tmp_path / "golden"), r"model.rcps=True, not False"),
        ({**keys, "fused_add_norm": False}, str(tmp_path / "golden"), r"model.fused_add_norm=True, not False"),
        (keys, str(tmp_path / "absent"), r"absent: neither a run nor a published checkpoint"),
    )
    for model, init_from, message in cases:
        config = small_run.config("refused", model=model, train={"init_from": init_from})
        with pytest.raises(UserError, match=f"^train.init_from: .*{message}") as refused:
            train(config)
        assert "\n" not in str(refused.value) and not Path(config.run.dir).exists()
    with pytest.raises(UserError, match=r"^train\.init_from: train\.decay_from gives the run its first weights"):
        small_run.config("both", train={"init_from": "x", "decay_from": "y", "schedule": "wsd"})


@pytest.mark.moderate
def test_exports_are_made_while_the_run_goes_on(small_run: SmallRun) -> None:
    config = small_run.config("run", train={"steps": 5}, checkpoint={"every": 3, "keep": 1, "export_every": 2})
    assert train(config) == 0
    folder = Path(config.run.dir) / "export"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000004"]
    plain = small_run.config("plain", train={"steps": 5}, checkpoint={"every": 4, "keep": 0})
    assert train(plain) == 0
    assert numbers(plain.run.dir) == numbers(config.run.dir)
    expected = hub.load(RunDirectory(plain.run.dir).checkpoint_path(4)).state_dict()
    found = hub.load(folder / "step-00000004").state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert "| steps | 4 |" in (folder / "step-00000004" / "README.md").read_text()


@pytest.mark.moderate
def test_an_export_that_fails_costs_no_more_than_itself(small_run: SmallRun, caplog) -> None:
    config = small_run.config("run", train={"steps": 2}, checkpoint={"export_every": 1}, valid={"every": 0})
    RunDirectory.create_or_resume(config).release()
    (Path(config.run.dir) / "export").write_text("a file stands in the way")
    assert train(config) == 0
    assert "the export of step 1 was not written" in caplog.text


@pytest.mark.slow
def test_under_every_strategy_runs_begin_from_weights_and_export_as_one_process_does(
    small_shards: Path, tmp_path: Path
) -> None:
    """The export has the state after two steps, while the third step is taken."""
    single, *shared = [layout for layout in LAYOUTS if layout.world <= 2]
    begun = config_of(single, small_shards, tmp_path / "begun", steps=2)
    assert train(begun) == 0
    configs = []
    for layout in (single, *shared):
        config = config_of(layout, small_shards, tmp_path / layout.name, steps=3, init_from=begun.run.dir)
        config.checkpoint.export_every = 2
        configs.append(config)
    alone, *configs = configs
    assert train(alone) == 0
    assert all(observed.refusal is None for of_ranks in train_all(2, configs) for observed in of_ranks)
    losses, expected = [row["loss"] for row in numbers(alone.run.dir)], exported(alone)
    assert {config.parallel.strategy for config in configs} == {"ddp", "fsdp", "deepspeed"} and len(losses) == 3
    for config in configs:
        assert [row["loss"] for row in numbers(config.run.dir)] == pytest.approx(losses, rel=1e-5), config.run.name
        found = exported(config)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5, msg=f"{config.run.name}, {name}")


def exported(config: Config) -> dict[str, torch.Tensor]:
    folder = Path(config.run.dir) / "export"
    assert [path.name for path in folder.iterdir()] == ["step-00000002"], config.run.name
    return hub.load(folder / "step-00000002").state_dict()
