"""Types of arguments that the command lines of this package share."""

import argparse
from pathlib import Path

from caduceus.presets import preset


def is_url(text: str) -> bool:
    """Whether this is an address rather than a path."""
    return "://" in text


def local_path(text: str) -> Path:
    """A path on this computer. It refuses an address, which would lose a slash as a path."""
    if is_url(text):
        raise argparse.ArgumentTypeError(f"takes a local path, got the address {text}")
    return Path(text)


def genomes_file(text: str) -> Path:
    """A local YAML file of several species, or the name of one in configs/genome/."""
    return preset("genome", local_path(text))


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)
