"""Command lines that tell a mistake in one line, as every other error of the user."""

import argparse
import math
from typing import Any, NoReturn

from caduceus.errors import UserError


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are `UserError`s, and whose `type=int` and `type=float` say what they take."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.register("type", int, whole_number)
        self.register("type", float, number)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see --help")


def whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}") from None


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number, got {text!r}")
    return value
