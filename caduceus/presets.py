"""The YAML files of configs/, by name: models and runs, clusters, genomes. Imports no torch."""

import re
from pathlib import Path

from caduceus.patience import is_file

CONFIGS = Path(__file__).parent / "configs"
"""In a clone this is a link to configs/; an installed package holds the files."""


def preset(kind: str, name: str | Path) -> Path:
    """The file that `name` means: the file of this path, or where there is none, the preset of this name in
    configs/KIND/.
    """
    path = Path(name)
    known = CONFIGS / kind / f"{name}.yaml"
    return known if len(path.parts) == 1 and not is_file(path) and is_file(known) else path


def presets(kind: str) -> dict[str, str]:
    """The presets of configs/KIND/: {name: the description in the first line of its file}, by the numbers in names."""
    found = sorted((CONFIGS / kind).glob("*.yaml"), key=lambda path: _by_numbers(path.stem))
    return {path.stem: _words(path) for path in found}


def preset_list(kind: str) -> str:
    """`presets` as lines of text."""
    found = presets(kind)
    width = max(map(len, found), default=0)
    return "\n".join(f"  {name:{width}}  {words}" for name, words in found.items())


def _by_numbers(name: str) -> list[tuple[bool, int, str]]:
    """What sorts `ps-1k` before `ps-32k`, `ps-131k` and `ps-1m`."""
    parts = re.split(r"(\d+[km]?\b)", name)
    return [(part[:1].isdigit(), _number(part) if part[:1].isdigit() else 0, part) for part in parts]


def _number(text: str) -> int:
    return int(text.rstrip("km")) * {"k": 1000, "m": 1_000_000}.get(text[-1], 1)


def _words(path: Path) -> str:
    first = path.read_text().partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
