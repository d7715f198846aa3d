import pytest

from caduceus.errors import UserError
from launch.sweep import sweep_configs


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text("train: {steps: 4}\n")
    return path


@pytest.mark.moderate
def test_every_combination_is_a_run_named_after_it(config):
    folder, configs = sweep_configs(config, ["train.steps=3"], ["train.lr=1e-3,8e-3", "model.rcps=true,false"])
    assert str(folder) == "runs/small-sweep"
    found = [(config.run.dir, config.run.name, config.train.lr, config.model.rcps) for config in configs]
    assert found[:2] == [
        ("runs/small-sweep/lr=1e-3,rcps=true", "small-lr=1e-3,rcps=true", 1e-3, True),
        ("runs/small-sweep/lr=1e-3,rcps=false", "small-lr=1e-3,rcps=false", 1e-3, False),
    ]
    assert len(configs) == 4
    assert {(config.train.steps, config.wandb.group) for config in configs} == {(3, "small-sweep")}


def test_one_value_is_the_same_for_all_runs(config):
    sweep = ["train.betas=[0.9,0.95],[0.9,0.99]", "train.lr=1e-3", "run.dir=there", "run.allow_change=[train.lr]"]
    folder, configs = sweep_configs(config, [], sweep)
    assert str(folder) == "there-sweep"
    assert [(config.run.name, config.train.betas, config.train.lr) for config in configs] == [
        ("small-betas=[0.9,0.95]", [0.9, 0.95], 1e-3),
        ("small-betas=[0.9,0.99]", [0.9, 0.99], 1e-3),
    ]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (["train.lr"], "expected KEY=VALUE"),
        (["train.lr=1e-3,"], "expected KEY=VALUE"),
        (["train.lr=1e-3,1e-3"], "the same name"),
        (["run.dir=a,b"], r"--sweep run\.dir=a,b: runs are named after their other keys; give run\.dir only one value"),
        (["run.name=a,b"], "give run.name only one value"),
        (["train.lr=1e-3"], "no key has several values"),
        (["train.rate=1,2"], "unknown key 'train.rate'"),
    ],
)
def test_wrong_sweeps_are_refused(config, sweep, message):
    with pytest.raises(UserError, match=message):
        sweep_configs(config, [], sweep)
