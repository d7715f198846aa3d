"""Loss on held-out sequences, per species."""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from torch import nn

from caduceus.data.loader import Batch


@torch.no_grad()
def held_out_loss(
    model: nn.Module, batches: Iterable[tuple[str, Batch]], device: torch.device, precision: str = "fp32"
) -> dict[str, float]:
    """Cross-entropy over all labelled bases (weighted by `loss_weights` where there are any), in nats.

    `batches` gives (species, batch). Returns {"valid_loss": …, "valid_loss/SPECIES": …}; a species without a labelled
    base is left out.
    """
    training = model.training
    model.eval()
    sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64, device=device))
    for species, batch in batches:
        with autocast(device, precision):
            output = model(**batch.model_inputs(device), return_logits=False)
        sums[species] += torch.stack([output.loss_sum, output.weight_sum]).double()
    model.train(training)
    losses = {}
    for species, (loss, weight) in sorted(sums.items()):
        if weight > 0:
            losses[f"valid_loss/{species}"] = (loss / weight).item()
    if not losses:
        return {}
    loss, weight = sum(sums.values())
    return {"valid_loss": (loss / weight).item(), **losses}


def autocast(device: torch.device, precision: str) -> torch.autocast | nullcontext:
    """bf16 autocast, or nothing for fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
