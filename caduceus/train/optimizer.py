"""The optimizer of a run: AdamW as published, Muon for matrices, and a moving average of the weights."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from caduceus.config import TrainConfig
from caduceus.devices import GPU
from caduceus.distributed.strategy import Strategy, local
from caduceus.errors import UserError
from caduceus.run.checkpoints import AVERAGE
from caduceus.train.vitals import parameter_kind

MATRICES = ("in_proj", "x_proj", "out_proj")
"""Kinds of parameters that Muon updates: (directions, rows, columns), each direction a matrix of its own."""
_MOMENTUM = 0.95


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """The optimizer of `config`, without weight decay on biases, norms, A_log and D. On GPUs it uses torch's fused
    AdamW.

    Raises `UserError` for a kind in `train.lr_scale` of which the model has no parameters.
    """
    groups = _groups(model, config)
    devices = {parameter.device.type for parameter in model.parameters()}
    options = {"lr": config.lr, "betas": tuple(config.betas), "fused": is_fused(devices)}
    if config.optimizer == "adamw" and not config.ema:
        return torch.optim.AdamW(groups, **options)
    return AdamWMuonEma(groups, config.ema, **options)


def is_fused(devices: set[str]) -> bool | None:
    """Whether to use torch's fused AdamW for parameters on `devices`; None lets torch choose. On a CPU it has other
    last bits.
    """
    return True if devices == {GPU} else None


def _groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    scales = dict(config.lr_scale or {})
    kinds = {parameter_kind(name) for name in names.values()}
    if unknown := sorted(scales.keys() - kinds):
        raise UserError(
            f"train.lr_scale: the model has no parameters of the kind '{unknown[0]}'; it has {', '.join(sorted(kinds))}"
        )
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for group in model.parameter_groups(config.weight_decay):
        for parameter in group["params"]:
            kind = parameter_kind(names[parameter])
            scale, by_muon = scales.get(kind, 1.0), config.optimizer == "muon" and kind in MATRICES
            found = groups.setdefault((group["weight_decay"], scale, by_muon), {**group, "params": []})
            found["params"].append(parameter)
            # Keys beyond AdamW's own are set only where needed, so checkpoints of the published recipe hold none.
            found.update({"lr_scale": scale} if scale != 1 else {}, **({"muon": True} if by_muon else {}))
    return list(groups.values())


class AdamWMuonEma(torch.optim.AdamW):
    """AdamW, with torch's Muon for the groups with `muon` (one matrix per direction), and a moving average of the
    weights.

    Muon's updates are scaled to the size of AdamW's, so that one learning rate and weight decay serve both (Liu et al.
    2025, "Muon is Scalable for LLM Training"). The decay of the average is min(decay, (1 + step) / (10 + step)), which
    is smaller at first; with `decay` 0 there is no average.
    """

    def __init__(self, groups: list[dict[str, Any]], decay: float, **options: Any) -> None:
        super().__init__(groups, **options)
        self.decay = decay

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient, and then the averages."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group.get("muon"):
                self._step_by_muon(group)
        if self.decay:
            self._average()
        return loss

    def _step_by_muon(self, group: dict[str, Any]) -> None:
        matrices, momenta = [], []
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] += 1
            for weight, gradient, momentum in zip(parameter, parameter.grad, state["momentum_buffer"], strict=True):
                matrix = nn.Parameter(weight)
                matrix.grad = gradient
                matrices.append(matrix)
                momenta.append(momentum)
        if not matrices:
            return
        options = {"momentum": _MOMENTUM, "adjust_lr_fn": "match_rms_adamw"}
        muon = torch.optim.Muon(matrices, lr=group["lr"], weight_decay=group["weight_decay"], **options)
        for matrix, momentum in zip(matrices, momenta, strict=True):
            muon.state[matrix]["momentum_buffer"] = momentum
        muon.step()

    def _average(self) -> None:
        updated = [p for group in self.param_groups for p in group["params"] if self.state.get(p)]
        if not updated:
            return
        step = self.state[updated[0]]["step"].item()
        for parameter in updated:
            if AVERAGE not in self.state[parameter]:
                self.state[parameter][AVERAGE] = parameter.detach().clone()
        averages = [self.state[parameter][AVERAGE] for parameter in updated]
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(map(local, averages)), list(map(local, updated)), share)


@contextlib.contextmanager
def averaged_weights(strategy: Strategy) -> Iterator[None]:
    """A context in which the model has its averaged weights; after it, its own again, bit for bit. All ranks enter it
    together.
    """
    _exchange(strategy)
    try:
        yield
    finally:
        _exchange(strategy)


@torch.no_grad()
def _exchange(strategy: Strategy) -> None:
    _forget_gathered(strategy)
    for parameter in strategy.network.parameters():
        state = strategy.optimizer.state.get(parameter)
        if not state:  # before the first update the average is the weights
            continue
        weight, average = local(parameter), local(state[AVERAGE])
        kept = weight.clone()
        weight.copy_(average)
        average.copy_(kept)
    _forget_gathered(strategy)


def _forget_gathered(strategy: Strategy) -> None:
    """Let FSDP gather the weights anew: the outer modules' weights stay gathered after a forward pass without a
    backward one.
    """
    for module in strategy.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
