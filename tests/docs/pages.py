"""Commands and programs that README and docs show, as they stand in the pages."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NEEDS = ("a cluster", "the network", "a GPU")
"""What a block may be marked with, as `<!-- needs a cluster -->` on the line before it, and is then not run."""

_BLOCK = re.compile(
    r"^(?:<!-- needs (?P<needs>.+?) -->\n)?```(?P<language>console|python)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: `language` is console or python."""

    page: Path
    line: int
    language: str
    text: str
    needs: str | None

    @property
    def commands(self) -> list[str]:
        """The lines after `$ `, each with its continuation lines; comments after two blanks are left out."""
        joined = self.text.replace("\\\n", " ")
        return [re.split(r"\s{2,}#", line[2:])[0].strip() for line in joined.splitlines() if line.startswith("$ ")]


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page that show commands or Python, in their order."""
    text = page.read_text()
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Block(page, line, match["language"], match["text"], match["needs"])
