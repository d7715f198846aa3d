"""Command lines that report a mistake in one line, like every other error of the user."""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from caduceus.commands import COMMANDS, command
from caduceus.errors import UserError
from caduceus.presets import preset_list


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` whose errors are `UserError`s, and whose `type=int` and `type=float` say which values they
    accept.

    `called`: the command's name, one of `COMMANDS`. `start`: what to print when the command is called without
    arguments; each `{caduceus-…}` in it is replaced by the command as it is called here.
    """

    def __init__(self, *args: Any, called: str | None = None, start: str | None = None, **keywords: Any) -> None:
        if called:
            keywords["prog"] = command(called)
        super().__init__(*args, **keywords)
        self._start = start
        self.register("type", int, whole_number)
        self.register("type", float, number)
        self.register("action", "parsers", _Subcommands)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse as argparse does. Called without arguments, the command prints its `start` and ends with status 2."""
        self._tell_how_to_start(args)
        return super().parse_known_args(args, namespace)

    def parse_known_intermixed_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As `parse_known_args`, through which Python 3.14 no longer goes."""
        self._tell_how_to_start(args)
        return super().parse_known_intermixed_args(args, namespace)

    def _tell_how_to_start(self, args: Sequence[str] | None) -> None:
        if args is None and self._start is not None and len(sys.argv) == 1:
            print(with_commands(self._start).strip())
            self.exit(2)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; see --help")


class _Subcommands(argparse._SubParsersAction):
    """Subcommands whose --help begins with what the list of subcommands says of them."""

    def add_parser(self, name: str, **keywords: Any) -> Any:
        about = keywords.get("help", "")
        return super().add_parser(name, **{"description": about[:1].upper() + about[1:], **keywords})


class PresetAction(argparse.Action):
    """`--config NAME`; the name `list` prints the presets of configs/KIND/ and ends the command."""

    def __init__(self, *args: Any, kind: str, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self._kind = kind

    def __call__(self, parser: Any, namespace: Any, value: Any, option_string: str | None = None) -> None:
        """Store the value, or print the list."""
        if str(value) == "list":
            print(preset_list(self._kind))
            parser.exit(0)
        setattr(namespace, self.dest, value)


def with_commands(text: str) -> str:
    """The text, with each `{caduceus-…}` replaced by the command as it is called here."""
    for name in COMMANDS:
        text = text.replace(f"{{{name}}}", command(name))
    return text


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
