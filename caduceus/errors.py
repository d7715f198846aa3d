"""Errors that end a process and that one line explains. Their types tell them apart. Imports no torch.

A `UserError` is the user's to mend, a `NodeError` is the machine's fault, and a `PeerError` follows from the failure of
another rank. Anything else is a crash, with its traceback.
"""

import enum
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable


class Kind(str, enum.Enum):
    """Whose failure ended a rank."""

    USER = "user"
    NODE = "node"
    RETRY = "retry"
    CRASH = "crash"
    PEER = "peer"


class UserError(Exception):
    """A mistake in what the user gave. The message is one line: what is wrong, where, and what to do."""

    kind = Kind.USER
    status = 2
    """Exit status of a process that ends with this error."""


class NodeError(UserError):
    """The machine that this process runs on is at fault, not the run.

    The message is one line that names the machine. The launcher starts the run again without this node.
    """

    kind = Kind.NODE


class RetryError(UserError):
    """What the run needs is in use or out of reach now; the same command may succeed later."""

    kind = Kind.RETRY


class PeerError(Exception):
    """This rank ended because of another one. The message is one line that names that rank where it is known.

    `rank` is the one that failed and `peer_kind` says how; each is None where only the loss of the peer was noticed.
    """

    kind = Kind.PEER

    def __init__(self, message: str, rank: int | None = None, peer_kind: Kind | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.peer_kind = peer_kind

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.rank, self.peer_kind)

    @property
    def status(self) -> int:
        """Exit status: that of the rank that failed, if it ended with a line; otherwise that of a crash."""
        return 2 if self.peer_kind in (Kind.USER, Kind.NODE, Kind.RETRY) else 1


ONE_LINE = (UserError, PeerError)
"""Exceptions that end a process with one line on stderr and their `status`, without a traceback."""


def kind_of(error: BaseException) -> Kind:
    """Whose failure an exception is, by its type."""
    return error.kind if isinstance(error, ONE_LINE) else Kind.CRASH


def of_rank(error: UserError, culprit: int, rank: int) -> UserError | PeerError:
    """The exception that `rank` raises for an error of the rank `culprit`: the error itself on `culprit`, a `PeerError`
    on others. Its message names the culprit.
    """
    return error if rank == culprit else PeerError(str(error), culprit, error.kind)


def one_line(error: BaseException) -> str:
    """The line that tells other processes about an exception: its message, with its type where that says more."""
    text = " ".join(str(error).split())
    if isinstance(error, ONE_LINE):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def tell(error: BaseException, interrupted: str = "interrupted") -> int:
    """Print on stderr what ends the process, in one line where that explains it, and return the exit status.

    After Ctrl-C it prints `interrupted`.
    """
    if isinstance(error, SystemExit):  # by which all has been said
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, ONE_LINE):
        print(f"error: {error}", file=sys.stderr)
        return error.status
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more must not change the status
        print(interrupted, file=sys.stderr)
        return 130
    traceback.print_exception(error)
    return 1


def run_command(main: Callable[[], int | None], interrupted: str = "interrupted") -> None:
    """Run a command line's `main` and exit with its status; `ONE_LINE` errors become one line and their status.

    After Ctrl-C it prints `interrupted`.
    """
    try:
        try:
            status = main()
        except (*ONE_LINE, KeyboardInterrupt, SystemExit) as error:
            status = tell(error, interrupted)
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        status = 128 + signal.SIGPIPE
    sys.exit(status or 0)


def _nobody_reads() -> bool:
    """Whether stdout goes to a reader that has left, as `head` does. The process then prints nothing more."""
    stdout = sys.stdout.fileno()
    pipe = select.poll()
    pipe.register(stdout, 0)
    if not any(events & select.POLLERR for _, events in pipe.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
    return True
