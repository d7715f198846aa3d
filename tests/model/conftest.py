"""The nine golden files: inputs, outputs and gradients of the published implementation, run in fp32."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor

DIRECTORY = Path(__file__).resolve().parents[1] / "golden"
NAMES = [
    "mamba_unidirectional",
    "ph_layernorm",
    "ph_multiply",
    "ph_tied",
    "ph_untied",
    "ps_fused",
    "ps_unfused",
    "ps_unidirectional_fused",
    "ps_untied_fused",
]


@dataclass
class Golden:
    config: dict
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose name starts with `prefix.`, without it."""
        prefix += "."
        return {name.removeprefix(prefix): t for name, t in self.tensors.items() if name.startswith(prefix)}


def load_golden(name: str) -> Golden:
    with safe_open(DIRECTORY / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        return Golden(json.loads(file.metadata()["config"]), tensors)


@pytest.fixture(params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return load_golden(request.param)


@pytest.fixture
def golden_ps() -> Golden:
    return load_golden("ps_fused")
