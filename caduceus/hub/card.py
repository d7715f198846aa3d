"""The model card of an export: what the model is, what it was trained on, and how well it did."""

from typing import Any

from caduceus.config import CaduceusConfig, stages_of
from caduceus.model.costs import parameter_count
from caduceus.run.directory import RunDirectory
from caduceus.run.rows import REACH, lines_from_end

CARD = "README.md"

_TEXT = """---
library_name: transformers
pipeline_tag: fill-mask
tags:
- biology
- dna
- caduceus
---

# {title}

A Caduceus ([Schiff et al. 2024](https://arxiv.org/abs/2403.03234)): a bi-directional language model of DNA, which
predicts bases from their context. `config.json` and `model.safetensors` are in the layout of the published code.

{model}
{training}
## Use

```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

folder = "."  # where these files are
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer("ACGT[MASK]ACGT", return_tensors="pt")
logits = model(**inputs).logits  # (1, 9, tokens)
```

Zeros of an `attention_mask` are padding, on either side, and change nothing.
"""


def model_card(config: CaduceusConfig, run: RunDirectory | None = None, step: int | None = None) -> str:
    """The card, in Markdown. With a `run` it includes its data, its fingerprint and its losses up to `step`."""
    title, training = describe(config), ""
    if run is not None:
        title, training = f"{run.config().run.name}: {title}", _training(run, step)
    return _TEXT.format(title=title, model=_table(facts(config)), training=training)


def describe(config: CaduceusConfig) -> str:
    """The kind of model, in a few words."""
    if config.rcps:
        return "Caduceus-PS, equivariant to the reverse complement"
    return "Caduceus-Ph" if config.bidirectional else "uni-directional Mamba"


def facts(config: CaduceusConfig) -> dict[str, Any]:
    """Facts about a model: {name: value}."""
    form = "streams swap in every block (fused_add_norm)" if config.fused_add_norm else "streams keep their places"
    vocabulary = config.vocabulary
    bases = ", ".join(f"{base} {token}" for base, token in zip("ACGT", vocabulary.bases, strict=True))
    return {
        "kind": describe(config),
        "parameters": f"{parameter_count(config):,}",
        "mixer": "Mamba" if config.mixer == "mamba" else f"Mamba-2, heads of {config.headdim} channels",
        "layers": config.n_layer,
        "width (d_model)": config.d_model,
        "states (d_state)": config.d_state,
        "vocabulary": f"{vocabulary.name}: {bases}; [MASK] {vocabulary.mask}, [PAD] {vocabulary.pad}",
        **({"block form": form} if config.rcps else {}),
        **({"in and out projections": _tie(config)} if config.bidirectional else {}),
    }


def _tie(config: CaduceusConfig) -> str:
    return "shared by the directions" if config.bidirectional_weight_tie else "separate for each direction"


def _training(run: RunDirectory, step: int | None) -> str:
    """The chapter on the run; empty for a run that has trained nothing."""
    rows = lines_from_end(run.metrics_path, "loss")
    trained = next((line for line in rows if step is None or line.row["step"] <= step), None)
    if trained is None:
        return ""
    config, last = run.config(), trained.row
    begun = stages_of(config)[: last.get("stage", 1)]
    lengths = ", then ".join(f"{stage.config.data.seq_len:,}" for stage in begun)
    start = run.stages().get(str(last.get("stage"))) or (run.starts() or [{}])[-1]
    data = config.data
    told: dict[str, Any] = {
        "steps": last["step"],
        "samples": f"{last['samples']:,}",
        "bases": f"{last['tokens']:,}",
        "sequence length": lengths,
        "objective": f"{data.objective}, {data.mask_prob:.0%} of the bases" if data.objective == "mlm" else "next base",
        "loss weight of soft-masked bases": data.repeat_weight,
        "fingerprint of the data's order": start.get("data_fingerprint", "not known"),
        "code": start.get("git_commit") or "not known",
        "training loss at the last step": f"{last['loss']:.4f} nats per labelled base",
    }
    of_step = (line.row for line in lines_from_end(run.metrics_path, "valid_loss", reach=REACH))
    validated: dict[str, Any] = next((row for row in of_step if step is None or row["step"] <= step), {})
    for name, loss in validated.items():
        if name.startswith("valid_loss"):
            species = name.partition("/")[2]
            of = f", {species}" if species else ""
            told[f"validation loss{of}, step {validated['step']}"] = f"{loss:.4f} nats per labelled base"
    return f"\n## Training\n\n{_table(told)}"


def _table(rows: dict[str, Any]) -> str:
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())
