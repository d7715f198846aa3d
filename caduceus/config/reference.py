"""docs/configuration.md, made of what the keys say: `python -m caduceus.config.reference > docs/configuration.md`."""

import json
from typing import Any

from caduceus.config.keys import FIXES, Key
from caduceus.config.run import KEYS, SECTIONS

_INTRODUCTION = """\
# Configuration

Every key of a run, with its default. Set them in a YAML file, or on the command line as `key.path=value`;
`python -m caduceus.train --config NAME --show` prints what a run would get. What a key fixes decides whether a run may
be resumed with another value:

{fixes}

This page is written by `make docs` from [caduceus/config/run.py](../caduceus/config/run.py).
"""


def reference() -> str:
    """The whole page, in Markdown."""
    fixes = "\n".join(f"- **{name}**: {words}." for name, words in FIXES.items())
    parts = [_INTRODUCTION.format(fixes=fixes)]
    for section, cls in SECTIONS.items():
        parts.append(f"## {section}\n\n{_first_line(cls.__doc__)}\n\n| key | default | fixes | |\n|---|---|---|---|")
        parts[-1] += "".join(_row(key) for key in KEYS.values() if key.section == section) + "\n"
    return "\n".join(parts)


def limits(key: Key) -> str:
    """The choices of a key, or its bounds, as words; empty where there are none."""
    if key.choices:
        return f"One of {', '.join(map(str, key.choices))}."
    return f"{key.bounds().capitalize()}." if key.bounds() else ""


def shown(value: Any) -> str:
    """A value as YAML on one line."""
    return "null" if value is None else str(value) if isinstance(value, str) else json.dumps(value)


def _row(key: Key) -> str:
    words = f"{key.words} {limits(key)}".strip().replace("|", "\\|")
    return f"\n| `{key.name}` | `{shown(key.default)}` | {key.fixes} | {words} |"


def _first_line(docstring: str | None) -> str:
    return (docstring or "").strip().splitlines()[0]


if __name__ == "__main__":
    print(reference(), end="")
