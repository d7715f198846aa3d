"""What a GPU records of a micro-batch's passes: nothing in them waits for it or depends on values.

The passes run on tensors of a GPU without memory, through what each operator of ours launches; no kernel runs.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from caduceus.config import Config, config_from_dict
from caduceus.distributed import strategy
from caduceus.distributed.captured import Captured
from caduceus.distributed.ranks import Ranks
from caduceus.errors import UserError
from caduceus.model.heads import CaduceusForMaskedLM
from caduceus.train.optimizer import build_optimizer
from tests.distributed.graphs import refuse

pytest.importorskip("triton")


class Watch(TorchDispatchMode):
    """Refuses what a graph cannot record, also in what the operators of ours launch, and counts all others."""

    def __init__(self) -> None:
        from tests.ops.aot import LAUNCHES

        super().__init__()
        self.bodies = {operation._opoverload: launch for operation, launch in LAUNCHES.items()}
        self.operators = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in self.bodies:
            with self:
                return self.bodies[function](*args, **(kwargs or {}))
        refuse(function, args)
        result = function(*args, **(kwargs or {}))
        assert function is not torch.ops.aten.lift_fresh.default, "a graph cannot record numbers that the host sends"
        self.operators += 1
        return result


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch):
    from triton.runtime.jit import JITFunction

    from caduceus.ops.triton import cross_entropy, device, gated, norm

    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: None)
    for module in (device, norm, cross_entropy, gated):
        monkeypatch.setattr(module, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(strategy, "initialise", lambda *_: None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # lets the ops take tensors that are not on a GPU
    for name in ("cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"Tensor.{name} waits for the GPU"))
    with FakeTensorMode():
        yield


CASES: dict[str, dict[str, Any]] = {
    "one strand, fp32": {},
    "both strands, bf16, told from within": {"model.rcps": True, "train.precision": "bf16"},
    "recomputed": {},
    "recomputed inputs": {"train.precision": "bf16"},
    "LayerNorm, untied": {"model.rms_norm": False, "model.bidirectional_weight_tie": False},
    "mamba2": {"model.mixer": "mamba2", "model.headdim": 16},
    "packed": {},
}
RECOMPUTED = {"recomputed": (1,), "recomputed inputs": (0, None, 1)}


def config_of(keys: dict[str, Any]) -> Config:
    values: dict[str, Any] = {"model": {"d_model": 32, "n_layer": 2}, "train": {"cuda_graphs": "passes"}}
    for name, value in keys.items():
        section, key = name.split(".")
        values[section][key] = value
    return config_from_dict(values)


@pytest.mark.moderate
@pytest.mark.parametrize("case", CASES)
def test_passes_never_wait_for_a_gpu(fake_gpu, case: str) -> None:
    config = config_of(CASES[case])
    model = CaduceusForMaskedLM(config.model, "triton", *RECOMPUTED.get(case, ()))
    captured = Captured(config, Ranks(0, 1, 1, torch.device("cpu")), model, build_optimizer)
    ids = torch.zeros(2, 512, dtype=torch.long)
    packed = {"starts": ids > 0} if case == "packed" else {}
    arguments = (ids, ids.clone(), torch.ones(2, 512)), {"return_logits": False, **packed}
    with Watch() as watch:
        passed = captured._pass_through(arguments, "told" in case)
    assert (passed.told is not None) == ("told" in case) and passed.sums.shape == (2, 2)
    assert watch.operators > 100


REFUSED = {
    "run.device=cpu": {"run": {"device": "cpu"}},
    "ops.backend=naive": {"ops": {"backend": "naive"}},
    "train.precision=fp64": {"train": {"precision": "fp64"}},
    "train.compile=true": {"train": {"compile": True}},
    "parallel.strategy=fsdp": {"parallel": {"strategy": "fsdp"}},
    "parallel.strategy=deepspeed": {"parallel": {"strategy": "deepspeed"}},
    "parallel.context=2": {"parallel": {"context": 2}},
    "parallel.strands=2": {"parallel": {"strands": 2}, "model": {"rcps": True}},
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_cannot_be_recorded_is_refused_in_a_line(named: str) -> None:
    keys = REFUSED[named]
    config_from_dict(keys)
    with pytest.raises(UserError, match=rf"train\.cuda_graphs: passes does not go with {named}: [^\n]*$"):
        config_from_dict({**keys, "train": {**keys.get("train", {}), "cuda_graphs": "passes"}})


@pytest.mark.parametrize(
    ("operation", "refused"),
    [
        (lambda x: x.sum().item(), "data_dependent_output"),
        (lambda x: x.nonzero(), "dynamic_output_shape"),
        (lambda x: x[x > 0], "dynamic_output_shape"),
        (lambda x: torch.randn(3), "nondeterministic_seeded"),
        (lambda x: x + torch.tensor(3.0), "the host sends"),
    ],
)
def test_the_watch_sees_what_waits(operation: Callable[[torch.Tensor], object], refused: str) -> None:
    with pytest.raises(AssertionError, match=refused), Watch():
        operation(torch.ones(3))
