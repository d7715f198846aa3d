"""The section `evaluations`: verbs of `python -m caduceus.evaluate` that run on the model while it trains. Imports no
torch.
"""

import re
from dataclasses import dataclass
from typing import Any

from caduceus.errors import UserError

VERBS = ("heldout", "embed", "variants", "probe", "finetune", "suite")
ABOUT = """\
Verbs of `python -m caduceus.evaluate` that run on the model at intervals while it trains: a mapping of names to `verb`,
`every` (the steps between two runs) and the verb's own options. See [using.md](using.md#while-a-run-trains)."""
SPACE = "eval/"
"""The prefix of evaluations' numbers in metrics.jsonl and W&B; an evaluation's name and `/` follow."""


@dataclass(frozen=True)
class Evaluation:
    """One entry of `evaluations`: its name, the verb, the steps between two runs, and the verb's options by their
    names.
    """

    name: str
    verb: str
    every: int
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Its key in the configuration."""
        return f"evaluations.{self.name}"


def evaluations_of(values: dict[str, Any]) -> list[Evaluation]:
    """The evaluations of a configuration. Raises `UserError`, which names the key, for anything else.

    The verb checks its own options.
    """
    found = []
    for name, given in values.items():
        place = f"evaluations.{name}"
        if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_-]{0,38}[A-Za-z0-9])?", str(name)):
            raise UserError(
                f"{place}: a name has at most 40 letters, digits, - and _, and begins and ends with a letter or digit"
            )
        if not isinstance(given, dict):
            raise UserError(
                f"{place}: expected a mapping, such as {{verb: heldout, every: 1000, split: test}}; got {given}"
            )
        options = dict(given)
        verb, every = options.pop("verb", None), options.pop("every", None)
        if verb not in VERBS:
            raise UserError(f"{place}.verb: choose one of {', '.join(VERBS)}; got {verb}")
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise UserError(f"{place}.every: give the steps between two evaluations, at least 1; got {every}")
        found.append(Evaluation(str(name), verb, every, options))
    return found
