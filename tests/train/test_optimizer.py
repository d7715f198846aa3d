"""What each optimizer computes, and that a run keeps it through restarts, checkpoints and exports."""

import dataclasses
from pathlib import Path

import pytest
import torch

from caduceus import CaduceusForMaskedLM
from caduceus.config import KEYS, CaduceusConfig, Config, TrainConfig
from caduceus.data.loader import build_validation
from caduceus.distributed.build import build_strategy
from caduceus.distributed.ranks import Ranks
from caduceus.distributed.strategy import set_learning_rate
from caduceus.errors import UserError
from caduceus.evaluate.heldout import held_out_loss
from caduceus.hub import load
from caduceus.model.costs import kept_numbers
from caduceus.run.checkpoints import AVERAGE
from caduceus.run.directory import RunDirectory
from caduceus.train import optimizer as optimizers
from caduceus.train.optimizer import MATRICES, averaged_weights, build_optimizer
from caduceus.train.trainer import train
from caduceus.train.vitals import parameter_kind
from tests.train.conftest import SmallRun, numbers

OPTIMIZERS = KEYS["train.optimizer"].choices
WITH_ALL = {"optimizer": "muon", "ema": 0.8, "lr_scale": {"A_log": 0.1, "embedding": 0.5}}


def small_model(tied: bool = True, mixer: str = "mamba") -> CaduceusForMaskedLM:
    torch.manual_seed(3)
    keys = {"d_model": 8, "n_layer": 1, "d_state": 4, "headdim": 4, "rcps": True}
    model = CaduceusForMaskedLM(CaduceusConfig(mixer=mixer, bidirectional_weight_tie=tied, **keys), "cpu")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return model


def stepped(config: TrainConfig, steps: int = 3, tied: bool = True) -> dict[str, torch.Tensor]:
    model = small_model(tied)
    optimizer = build_optimizer(model, config)
    for _ in range(steps):
        set_learning_rate(optimizer, 1e-2)
        optimizer.step()
    return dict(model.named_parameters())


@pytest.mark.parametrize("ema", [0, 0.9])
@pytest.mark.parametrize(("tied", "mixer"), [(True, "mamba"), (False, "mamba"), (False, "mamba2")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_optimizer_keeps_is_what_sizes_are_reckoned_with(name: str, tied: bool, mixer: str, ema: float) -> None:
    config, model = TrainConfig(optimizer=name, ema=ema), small_model(tied, mixer)
    optimizer = build_optimizer(model, config)
    optimizer.step()
    kept = [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim()]
    assert sum(tensor.numel() for tensor in kept) == kept_numbers(model.config, config)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "adamw"])
def test_no_choice_is_adamw_by_another_name(name: str) -> None:
    found, adamw = stepped(TrainConfig(optimizer=name)), stepped(TrainConfig())
    assert any(not torch.equal(weight, adamw[name]) for name, weight in found.items())


@pytest.mark.parametrize("tied", [True, False])
def test_muon_updates_each_direction_as_torch_does_a_matrix_and_the_rest_is_adamw(tied: bool) -> None:
    before = {name: weight.detach().clone() for name, weight in small_model(tied).named_parameters()}
    found, adamw = stepped(TrainConfig(optimizer="muon"), tied=tied), stepped(TrainConfig(), tied=tied)
    gradients = {name: parameter.grad for name, parameter in small_model(tied).named_parameters()}
    for name, weight in found.items():
        if parameter_kind(name) not in MATRICES:
            assert torch.equal(weight, adamw[name])
            continue
        for direction, matrix in enumerate(weight):
            alone = torch.nn.Parameter(before[name][direction].clone())
            alone.grad = gradients[name][direction].clone()
            muon = torch.optim.Muon([alone], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
            for _ in range(3):
                muon.step()
            assert torch.equal(matrix, alone)
            assert not torch.equal(matrix, adamw[name][direction])


def test_kinds_have_their_own_learning_rates() -> None:
    before = {name: weight.detach().clone() for name, weight in small_model().named_parameters()}
    plain = stepped(TrainConfig(), steps=1)
    scaled = stepped(TrainConfig(lr_scale={"A_log": 0.1, "embedding": 0, "in_proj": 1.0}), steps=1)
    for name, weight in scaled.items():
        if parameter_kind(name) == "A_log":
            torch.testing.assert_close(weight - before[name], 0.1 * (plain[name] - before[name]))
        elif parameter_kind(name) == "embedding":
            assert torch.equal(weight, before[name])
        else:
            assert torch.equal(weight, plain[name])
    with pytest.raises(UserError, match=r"no parameters of the kind 'A_logs'; it has A_log, D, conv_bias, "):
        build_optimizer(small_model(), TrainConfig(lr_scale={"A_logs": 0.1}))


def test_the_published_recipe_stays_torchs_own_adamw() -> None:
    optimizer = build_optimizer(small_model(), TrainConfig())
    assert type(optimizer) is torch.optim.AdamW and len(optimizer.param_groups) == 2
    assert not {"lr_scale", "muon"} & {key for group in optimizer.param_groups for key in group}


def test_fused_adamw_is_taken_on_gpus_and_computes_the_same_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    assert optimizers.is_fused({"cuda"}) is True
    assert optimizers.is_fused({"cpu"}) is optimizers.is_fused({"cpu", "cuda"}) is None
    plain = stepped(TrainConfig(), steps=20)
    monkeypatch.setattr(optimizers, "is_fused", lambda devices: True)
    fused = stepped(TrainConfig(), steps=20)
    for name, weight in fused.items():
        torch.testing.assert_close(weight, plain[name], rtol=1e-5, atol=1e-7)


def test_the_average_is_that_of_the_weights_after_each_step() -> None:
    model = small_model()
    optimizer = build_optimizer(model, TrainConfig(ema=0.5))
    weight, expected = model.embedding.weight, None
    for step in range(1, 8):
        optimizer.step()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = weight.detach() if expected is None else decay * expected + (1 - decay) * weight.detach()
        expected = expected.clone()
    torch.testing.assert_close(optimizer.state[weight][AVERAGE], expected)


def test_averaged_weights_come_and_go_without_a_changed_bit(small_run: SmallRun) -> None:
    config = small_run.config("run", train={"ema": 0.9})
    strategy = build_strategy(config, Ranks(0, 1, 1, torch.device("cpu")), build_optimizer)
    parameters = list(strategy.model.parameters())
    with averaged_weights(strategy):
        pass  # before the first update the average is the weights
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    strategy.optimizer.step()
    for parameter in parameters:
        strategy.optimizer.state[parameter][AVERAGE].add_(1)
    own = [parameter.detach().clone() for parameter in parameters]
    with averaged_weights(strategy):
        for parameter, weight in zip(parameters, own, strict=True):
            torch.testing.assert_close(parameter.detach(), weight + 1)
    assert all(torch.equal(parameter, weight) for parameter, weight in zip(parameters, own, strict=True))


def whole_keys() -> dict:
    return {**WITH_ALL, "steps": 3, "warmup_steps": 1}


@pytest.fixture(scope="module")
def whole(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A finished run with Muon, an average and rates of their own."""
    small_run = SmallRun(small_shards, tmp_path_factory.mktemp("whole"))
    config = small_run.config("whole", train=whole_keys(), valid={"every": 3}, monitor={"windows": 0})
    assert train(config) == 0
    return config


@pytest.mark.slow
def test_a_run_that_stops_makes_the_same_numbers(small_run: SmallRun, whole: Config) -> None:
    config = small_run.config("broken", train=whole_keys(), valid={"every": 3}, monitor={"windows": 0})
    config.run.time_budget_minutes = 1e-6
    assert train(config) != 0
    config.run.time_budget_minutes = 0
    assert train(config) == 0
    assert numbers(config.run.dir) == numbers(whole.run.dir)


@pytest.mark.moderate
def test_what_is_exported_is_the_average_that_was_validated(whole: Config) -> None:
    last = numbers(whole.run.dir)[-1]
    validation = build_validation(whole)
    found = held_out_loss(load(whole.run.dir), validation, torch.device("cpu"))["valid_loss"]
    assert found == pytest.approx(last["valid_loss_ema"], rel=1e-6)
    assert abs(found - last["valid_loss"]) > 1e-4


@pytest.mark.parametrize("name", ["optimizer", "lr_scale", "ema"])
def test_what_a_checkpoint_holds_of_the_optimizer_cannot_change(whole: Config, name: str) -> None:
    config = dataclasses.replace(whole, train=dataclasses.replace(whole.train), run=dataclasses.replace(whole.run))
    setattr(config.train, name, getattr(TrainConfig(), name))
    config.run.allow_change = [f"train.{name}"]
    with pytest.raises(UserError, match=rf"holds a run with train\.{name}=.*; choose another run\.dir$"):
        RunDirectory.create_or_resume(config)


@pytest.mark.parametrize(
    ("keys", "strategy", "words"),
    [
        ({"optimizer": "muon"}, "fsdp", r"train\.optimizer: muon needs whole matrices, .* use parallel\.strategy=ddp"),
        ({"optimizer": "muon"}, "deepspeed", r"train\.optimizer: muon needs whole matrices"),
        ({"ema": 0.9}, "deepspeed", r"train\.ema: parallel\.strategy=deepspeed .* use ddp or fsdp"),
        ({"lr_scale": [1]}, "auto", r"train\.lr_scale: expected factors by kind"),
        ({"lr_scale": {"D": -1}}, "auto", r"train\.lr_scale: the factor of D must be a number of at least 0, got -1"),
    ],
)
def test_what_would_be_wrong_is_refused_by_name(small_run: SmallRun, keys: dict, strategy: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        small_run.config("run", train=keys, parallel={"strategy": strategy})
