"""Errors that are the user's to mend: one line, exit status 2, no traceback."""

import signal
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake in what the user gave. The message is one line: what is wrong, where, and what to do."""


class NodeError(UserError):
    """The machine that this process runs on is at fault, not the run. The message is one line that names the machine.

    The launcher starts such a run again without the node.
    """


def run_command(main: Callable[[], int | None], interrupted: str = "interrupted") -> None:
    """Run a command line's `main` and exit with its status; a `UserError` becomes one line and status 2.

    `interrupted` is said after Ctrl-C.
    """
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more must not change the status
        print(interrupted, file=sys.stderr)
        status = 130
    sys.exit(status or 0)
