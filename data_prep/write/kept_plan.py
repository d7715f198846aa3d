"""Saves a species' plan in its folder, for the tasks that write its shards, and for a command that goes on."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from caduceus.files import write_atomically
from caduceus.patience import patiently
from data_prep.plan.species import SpeciesPlan, SpeciesRequest, assembled
from data_prep.plan.windows import PLANNED_DTYPE
from data_prep.write.directory import PLAN

_VERSION = 1
"""Version of the rules by which options make a plan. Raise it when these change: saved plans are then made anew."""


def keep_plan(folder: Path, plan: SpeciesPlan, identity: dict[str, Any]) -> None:
    """Write a plan's windows, contigs and report into the species' folder."""
    facts = {"of": _made_of(identity), "contigs": list(plan.contigs.items()), "report": plan.report}
    buffer = io.BytesIO()
    np.savez(buffer, windows=plan.windows, facts=np.frombuffer(json.dumps(facts).encode(), np.uint8))
    write_atomically(folder / PLAN, buffer.getvalue())


def kept_plan(
    folder: Path, request: SpeciesRequest, identity: dict[str, Any], is_there: bool = False
) -> SpeciesPlan | None:
    """The saved plan of this species; None where there is none, or only one with other options or of another version.

    `is_there`: another node has written one, so wait for it to appear.
    """
    try:
        content = patiently((folder / PLAN).read_bytes, is_there)
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            windows, facts = arrays["windows"], json.loads(arrays["facts"].tobytes())
    except (OSError, ValueError, KeyError):
        return None
    if facts["of"] != _made_of(identity) or windows.dtype != PLANNED_DTYPE:
        return None
    return assembled(request, dict(facts["contigs"]), windows, facts["report"])


def _made_of(identity: dict[str, Any]) -> dict[str, Any]:
    """The values that a plan depends on, as they come back from JSON; weights are not among them."""
    plan = {key: value for key, value in identity["plan"].items() if key not in ("weight", "weight_exponent")}
    return json.loads(json.dumps({**identity, "plan": plan, "version": _VERSION}))
