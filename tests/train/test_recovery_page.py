"""docs/recovery.md is found by what a user sees: what it quotes is what the code says."""

import re

from tests.conftest import REPOSITORY


def test_what_the_page_quotes_is_said_by_the_code() -> None:
    page = (REPOSITORY / "docs" / "recovery.md").read_text()
    folders = ("caduceus", "data_prep", "launch")
    sources = [path.read_text() for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    code = re.sub(r'"\s*\n\s*f?"', "", "\n".join(sources))  # texts that go on in the next line
    quotes = re.findall(r"^\*\*`(.+?)`", page, re.M)
    assert len(quotes) >= 19
    for quote in quotes:
        if len(quote.split()) == 1:
            assert quote in code
            continue
        # Between what differs from run to run, stand words of the code.
        pieces = re.split(r"RUN|…|\d[\d.]*|\(.*?\)|nan|__\S+|`.*", quote)
        words = [text for piece in pieces if len((text := piece.strip(" ;,:='")).split()) >= 3]
        assert words, quote
        for piece in words:
            assert any(part in code for part in _windows(piece)), (quote, piece)


def _windows(text: str) -> list[str]:
    """Every three words that follow each other: a text of the code may be cut by a value."""
    words = text.split()
    return [" ".join(words[first : first + 3]) for first in range(len(words) - 2)]
