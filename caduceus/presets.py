"""The YAML files of configs/, by name: models and runs, clusters, genomes. Imports no torch."""

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
    """The presets of configs/KIND/: {name: the description in the first line of its file}."""
    return {path.stem: _words(path) for path in sorted((CONFIGS / kind).glob("*.yaml"))}


def preset_list(kind: str) -> str:
    """`presets` as lines of text."""
    found = presets(kind)
    width = max(map(len, found), default=0)
    return "\n".join(f"  {name:{width}}  {words}" for name, words in found.items())


def _words(path: Path) -> str:
    first = path.read_text().partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
