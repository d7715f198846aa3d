"""The golden files: inputs, outputs and gradients of the published implementation, run in fp32."""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from caduceus.hub.published import PublishedLayout, from_published
from caduceus.model.heads import CaduceusForMaskedLM

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
    "plantcad1_ps_fused",
    "ps_mamba2_fused",
    "ps_mamba2_fused_n64",
    "ph_mamba2",
    "ph_mamba2_untied",
    "mamba2_unidirectional",
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

    def model(self, backend: str) -> CaduceusForMaskedLM:
        published = from_published(self.config, self.part("state"))
        model = CaduceusForMaskedLM(published.config, backend=backend)
        model.load_state_dict(published.state_dict())
        return model

    def gradient_errors(self, model: CaduceusForMaskedLM) -> dict[str, float]:
        """The error of every parameter's gradient, by the parameter's published name."""
        gradients = PublishedLayout(model.config).to_published({name: p.grad for name, p in model.named_parameters()})
        return {name: relative_error(gradients[name], expected) for name, expected in self.part("grad").items()}


def load_golden(name: str) -> Golden:
    with safe_open(DIRECTORY / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        return Golden(json.loads(file.metadata()["config"]), tensors)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()
