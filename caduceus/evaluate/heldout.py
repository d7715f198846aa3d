"""The loss on held-out sequences, per species, and the other numbers of a validation."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from caduceus.data.batch import Batch
from caduceus.data.loader import ValidationLoader
from caduceus.errors import UserError
from caduceus.evaluate.detail import Details, Mirror, of_loss, reverse_complement_of
from caduceus.model.heads import MaskedLMOutput
from caduceus.model.precision import autocast


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    batches: ValidationLoader,
    device: torch.device,
    precision: str = "fp32",
    add_up: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
    each: Callable[[ValidationLoader], Iterable[tuple[str, Batch]]] = iter,
    mirror: Mirror | None = None,
    seen: Callable[[str, MaskedLMOutput], None] = lambda species, output: None,
) -> dict[str, float]:
    """Cross-entropy over all labelled bases (weighted by `loss_weights` where there are any), in nats.

    `add_up` adds a tensor up over the ranks that share the batches, and `each` iterates over these. With `mirror`, the
    first batch of each species is also predicted from its reverse complement. `seen` is called with the species and the
    output of each batch. Returns {"valid_loss": …, "valid_loss/SPECIES": …}, without species that have no labelled
    base, and the numbers of a validation in `docs/watching.md`: perplexity, bits per base, accuracy by region and
    species, confusion, and how far the strands disagree. Raises `UserError` where no base is labelled and counts.
    """
    training = model.training
    model.eval()
    rows = {species: row for row, species in enumerate(batches.species)}
    sums = torch.zeros(len(rows), 2, dtype=torch.float64, device=device)
    vocabulary = getattr(model, "module", model).config.vocabulary
    details, mirrored = Details(batches.species, vocabulary, device), set()
    for species, batch in each(batches):
        with autocast(device, precision):
            output = model(batch.input_ids, batch.labels, batch.loss_weights, starts=batch.starts)
        sums[rows[species]] += torch.stack([output.loss_sum, output.weight_sum]).sum(1, dtype=torch.float64)
        details.add(species, output.logits, batch)
        seen(species, output)
        if mirror is not None and species not in mirrored:
            mirrored.add(species)
            with autocast(device, precision):
                # A packed sequence ends where the next one begins, so its mirror image begins there.
                starts = None if batch.starts is None else mirror(batch.starts.roll(-1, 1))
                reverse = model(reverse_complement_of(batch, vocabulary, mirror), starts=starts).logits
            details.add_strands(species, output.logits, mirror(reverse), batch)
    model.train(training)
    sums, of_details = add_up(sums), add_up(details.sums)
    loss, weight = sums.sum(0).tolist()
    if weight == 0:
        raise UserError(
            "validation: no base is labelled and counts for the loss; raise valid.samples, or see data.mask_prob, "
            "data.repeat_weight and data.weights_bed"
        )
    of_species = zip(batches.species, sums.tolist(), strict=True)
    return {
        "valid_loss": loss / weight,
        **{f"valid_loss/{name}": loss / weight for name, (loss, weight) in of_species if weight},
        **of_loss(loss / weight),
        **details.row(of_details.cpu()),
    }
