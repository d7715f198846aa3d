"""Makes docs/configuration.md from the keys: `python -m caduceus.config.reference > docs/configuration.md`."""

import json
import textwrap
from typing import Any

from omegaconf import OmegaConf

from caduceus.config.evaluations import ABOUT
from caduceus.config.fixed import value_of
from caduceus.config.keys import FIXES, Key, name_of
from caduceus.config.run import KEYS, SECTIONS, Config

_INTRODUCTION = """\
# Configuration

This page lists every key of a run, with its default and its meaning. Set keys in a YAML file, or on the command line as
`key.path=value`; `python -m caduceus.train --config NAME --show` prints what a run would get. The column *fixes* says
whether a run may be resumed with another value. A key fixes

{fixes}

This page is written by `make docs` from the keys in [caduceus/config](../caduceus/config).
"""


def reference() -> str:
    """The whole page, in Markdown."""
    fixes = "\n".join(f"- **{name}**: {words}." for name, words in FIXES.items())
    parts = [_INTRODUCTION.format(fixes=fixes)]
    for section in SECTIONS:
        parts.append(f"## {section}\n\n{about_section(section)}\n\n| key | default | fixes | |\n|---|---|---|---|")
        parts[-1] += "".join(_row(key) for key in KEYS.values() if key.section == section) + "\n"
    parts.append(f"## evaluations\n\n{ABOUT}\n")
    return "\n".join(parts)


def annotated(config: Config) -> str:
    """The configuration as YAML that `load_config` can read, with the words of every section and key as comments."""
    lines = []
    for section in SECTIONS:
        lines += [f"# {about_section(section)}", f"{section}:"]
        for key in (key for key in KEYS.values() if key.section == section):
            words = f"{key.words} {limits(key)}".strip()
            lines += textwrap.wrap(words, 116, initial_indent="  # ", subsequent_indent="  # ")
            value = OmegaConf.to_yaml({name_of(key.attribute): value_of(config, key)})
            lines += textwrap.indent(value, "  ").splitlines()
        lines.append("")
    lines += textwrap.wrap(ABOUT.partition(" See ")[0], 116, initial_indent="# ", subsequent_indent="# ")
    lines += OmegaConf.to_yaml({"evaluations": config.evaluations}).splitlines()
    return "\n".join([*lines, ""])


def about_section(section: str) -> str:
    """One sentence about a section."""
    return (SECTIONS[section].__doc__ or "").strip().splitlines()[0]


def limits(key: Key) -> str:
    """The choices of a key, or its bounds, in words; empty where there are none."""
    if key.choices:
        return f"One of {key.known()}."
    return f"{key.bounds().capitalize()}." if key.bounds() else ""


def shown(value: Any) -> str:
    """A value as YAML on one line."""
    return "null" if value is None else str(value) if isinstance(value, str) else json.dumps(value)


def _row(key: Key) -> str:
    words = f"{key.words} {limits(key)}".strip().replace("|", "\\|")
    return f"\n| `{key.name}` | `{shown(key.default)}` | {key.fixes} | {words} |"


if __name__ == "__main__":
    print(reference(), end="")
