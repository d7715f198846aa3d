"""What every `monitor.every`-th step tells of the network: right, and without a trace in the run itself."""

import pytest
import torch
import torch.nn.functional as F

from caduceus.alphabet import IGNORE_LABEL
from caduceus.data import ShardedGenome, build_loader
from caduceus.distributed.build import build_strategy
from caduceus.distributed.ranks import Ranks
from caduceus.model import mamba
from caduceus.model.observer import STATISTICS
from caduceus.train.optimizer import build_optimizer
from caduceus.train.trainer import train
from caduceus.train.vitals import parameter_kind
from tests.train.conftest import SmallRun, numbers

KINDS = {"embedding", "norm", "in_proj", "conv_weight", "conv_bias", "x_proj", "dt_proj", "dt_bias", "A_log", "D"}
KINDS |= {"out_proj"}
ADDED = ("grad_norm/", "update_ratio/", "epoch/", "loss_", *(f"{name}/" for name in STATISTICS))


def without_vitals(row: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if not key.startswith(ADDED)}


@pytest.mark.moderate
@pytest.mark.parametrize("how", [{}, {"activation_checkpointing": "block"}])
def test_they_change_no_bit_of_the_run(small_run: SmallRun, how: dict[str, str]) -> None:
    sections = {"train": {"steps": 4, **how}, "checkpoint": {"every": 9}}
    for every in (0, 1, 2):
        train(small_run.config(f"every-{every}", **sections, monitor={"report": False, "every": every}))
    never, always, some = (numbers(small_run.directory / f"every-{every}") for every in (0, 1, 2))
    assert [without_vitals(row) for row in always] == never == [without_vitals(row) for row in some]
    assert [row["step"] for row in some if "dt_p50/00" in row] == [2, 4]
    assert all({f"grad_norm/{kind}" for kind in KINDS} < row.keys() for row in always if "loss" in row)


@pytest.mark.moderate
def test_norms_ratios_and_epochs_are_those_of_the_first_update(small_run: SmallRun) -> None:
    config = small_run.config("run", train={"steps": 1, "warmup_steps": 0, "clip_norm": 0.01}, monitor={"every": 1})
    config.monitor.report, config.train.precision, config.valid.every = False, "fp64", 0
    train(config)
    [row] = numbers(config.run.dir)

    strategy = build_strategy(config, Ranks(0, 1, 1, torch.device("cpu")), build_optimizer)
    loader = build_loader(config)
    batches = [batch for _, batch in zip(range(2), loader, strict=False)]
    labelled = sum(int((batch.labels != IGNORE_LABEL).sum()) for batch in batches)
    for batch in batches:
        (strategy.model(batch.input_ids, batch.labels).loss_sum.sum() / labelled).backward()
    named = dict(strategy.model.named_parameters())
    gradients = {name: parameter.grad.clone() for name, parameter in named.items()}
    weights = {name: parameter.detach().clone() for name, parameter in named.items()}
    strategy.clip(0.01)
    strategy.step(config.train.lr)
    kinds = {parameter_kind(name) for name in named}
    assert kinds == KINDS
    whole = 0.0
    for kind in kinds:
        names = [name for name in named if parameter_kind(name) == kind]
        norm = sum(gradients[name].square().sum() for name in names).sqrt().item()
        moved = sum((named[name] - weights[name]).square().sum() for name in names).sqrt().item()
        weight = sum(weights[name].square().sum() for name in names).sqrt().item()
        assert row[f"grad_norm/{kind}"] == pytest.approx(norm)
        assert row[f"update_ratio/{kind}"] == pytest.approx(moved / weight)
        whole += norm**2
    assert row["grad_norm"] == pytest.approx(whole**0.5)
    crops = len(ShardedGenome(small_run.shards).table("small", "train").windows) * 2048 // 128
    assert 8 / crops <= row["epoch/small"] < 8 / (0.7 * crops)  # windows at the ends of contigs are shorter


def test_layers_tell_step_sizes_and_scales(small_run: SmallRun) -> None:
    """The step sizes of the model are known: they are constant, as their projections are zero."""
    config = small_run.config("run", model={"d_model": 16, "n_layer": 2, "d_state": 4, "rcps": True})
    strategy = build_strategy(config, Ranks(0, 1, 1, torch.device("cpu")), build_optimizer)
    model, batch = strategy.model, next(iter(build_loader(config)))
    with torch.no_grad():
        for number, block in enumerate(model.blocks):
            block.mixer.dt_proj.zero_()
            block.mixer.dt_bias.fill_(number - 3)
            block.mixer.A_log.zero_()
        seen = []
        for block in model.blocks:
            block.register_forward_hook(lambda module, inputs, output: seen.append(output))
        with model.observing() as observer:
            model(batch.input_ids)
        told = observer.told()
    assert told.shape == (2, len(STATISTICS))
    for number in range(2):
        dt = F.softplus(torch.tensor(number - 3.0))
        assert torch.allclose(told[number, :3], dt.expand(3))
        assert torch.allclose(told[number, 3:6], torch.exp(-dt).expand(3))
        mixed, residual = (values[:, 0].square().mean().sqrt() for values in seen[number])
        assert torch.allclose(told[number, 6:], torch.stack([residual, mixed]))
    assert model.blocks[0].observer is None and model.blocks[0].mixer.observer is None


@pytest.mark.parametrize("rcps", [False, True])
def test_observed_steps_are_those_of_the_scan(small_run: SmallRun, monkeypatch: pytest.MonkeyPatch, rcps: bool) -> None:
    config = small_run.config("run", model={"d_model": 16, "n_layer": 2, "d_state": 4, "rcps": rcps})
    model = build_strategy(config, Ranks(0, 1, 1, torch.device("cpu")), build_optimizer).model
    batch, scan, given = next(iter(build_loader(config))), mamba.bidirectional_scan, []

    def recorded(u: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, *rest: torch.Tensor, **options) -> torch.Tensor:
        given.append((F.softplus(dt[:, 0, 0] + rest[-1][:, None]), A))
        return scan(u, dt, A, *rest, **options)

    monkeypatch.setattr(mamba, "bidirectional_scan", recorded)
    with torch.no_grad(), model.observing() as observer:
        model(batch.input_ids)
    at = torch.tensor([0.05, 0.5, 0.95])
    middle = slice(64 - 32 + 3, 64 + 32 - 3)  # less the positions whose convolution reaches beyond
    for layer, (dt, A) in zip(observer.told(), given, strict=True):
        assert torch.allclose(layer[:3], dt[:, middle].flatten().quantile(at), rtol=1e-4)
        decays = (dt[:, middle, :, None] * A[:, None]).exp()
        assert torch.allclose(layer[3:6], decays.flatten().quantile(at), rtol=1e-4)
