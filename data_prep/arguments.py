"""What the command lines of this package have in common: errors of one line, and types of arguments."""

import argparse
from pathlib import Path
from typing import NoReturn

from caduceus.errors import UserError


class Parser(argparse.ArgumentParser):
    """Tells a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def is_url(text: str) -> bool:
    """Whether this is an address rather than a path."""
    return "://" in text


def local_path(text: str) -> Path:
    """A path on this computer: as a path, an address would lose a slash."""
    if is_url(text):
        raise argparse.ArgumentTypeError(f"takes a local path, got the address {text}")
    return Path(text)


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)
