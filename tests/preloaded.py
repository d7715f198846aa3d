"""Starts the project's commands from a process that has imported what they import, as `subprocess` would start them.

Importing takes a command longer than what most tests have it do. `Popen` and `run` take what subprocess's take. A
command that `is_served` is forked from a server (tests/preload_server.py), which each pytest process starts when it
first needs it, and becomes a real process and child of this one: it has a number of its own, can be killed, stopped and
sent signals, and inherits what subprocess's children inherit. Everything else is started by subprocess.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("caduceus", "data_prep", "demo", "launch", "tests")
READ_AT_START = (
    "GLIBC_TUNABLES", "GOMP_", "KMP_", "LANG", "LC_", "LD_", "MALLOC_", "MKL_", "MPLBACKEND", "NUMBA_", "OMP_",
    "OPENBLAS_", "PYTHON", "TORCHELASTIC_RUN_ID", "TORCH_LOGS", "TRITON_",
)  # fmt: skip
"""How variables begin that Python or a library reads when it is loaded."""
SET_LATER = ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK", "OMP_NUM_THREADS", "PYTHONPATH", "TRITON_CACHE_DIR")
"""Those of them that a forked process heeds all the same, or that scikit-learn sets for a library that is not here."""
KNOWN = {"cwd", "env", "start_new_session", "stdin", "stdout", "stderr", "text"}
"""Arguments of subprocess.Popen that a forked process understands."""
_PR_SET_CHILD_SUBREAPER = 36
_AT_START = dict(os.environ)
"""Before any test changed a variable for itself: what a server is started with, whichever test needs it first."""


def is_served(command: Sequence[str], options: Mapping[str, Any], at_start: Mapping[str, str]) -> bool:
    """Whether a forked process does what a fresh one would: the one rule for all tests.

    It is one of our modules or scripts, run by this Python without options of Python's own, and neither its environment
    nor its folder change what is imported or how. `at_start` is the environment that the server was started with.
    """
    python, kind, *_ = [*command, "", ""]
    if python != sys.executable or not options.keys() <= KNOWN:
        return False
    folder = Path(options.get("cwd") or Path.cwd())
    if kind == "-m":
        ours = command[2].split(".")[0] in PACKAGES and (folder == REPOSITORY or not (folder / "caduceus").exists())
    else:
        script = (folder / kind).resolve()
        ours = kind.endswith(".py") and any(script.is_relative_to(REPOSITORY / package) for package in PACKAGES)
    given = os.environ if options.get("env") is None else options["env"]
    return ours and _foreign(given) == _foreign(at_start) and not changed_at_start(given, at_start)


def changed_at_start(given: Mapping[str, str], at_start: Mapping[str, str]) -> list[str]:
    """The variables that differ and that only a fresh process heeds."""
    names = {name for name in {*given, *at_start} if given.get(name) != at_start.get(name)} - {*SET_LATER}
    return sorted(name for name in names if name.startswith(READ_AT_START))


def _foreign(environment: Mapping[str, str]) -> list[str]:
    """What is imported from besides this repository and what is installed."""
    path = environment.get("PYTHONPATH", "").split(os.pathsep)
    return [entry for entry in path if entry and Path(entry) != REPOSITORY]


def Popen(command: Sequence[Any], **options: Any) -> subprocess.Popen:
    """Start a command; `options` are those of subprocess.Popen."""
    command = [os.fspath(word) for word in command]
    server = _the_server()
    if is_served(command, options, server.environment):
        return _Forked(server, command, **options)
    return subprocess.Popen(command, **options)


def run(
    command: Sequence[Any],
    *,
    input: str | bytes | None = None,
    capture_output: bool = False,
    timeout: float | None = None,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess:
    """Run a command to its end, as subprocess.run does."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            output, errors = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


class _Server:
    """A process that forks others; it ends with this one."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.environment = dict(_AT_START)
        self._lock = threading.Lock()
        self._channel, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tests.preload_server", str(theirs.fileno()), " " * 4096]
            # Libraries must not start threads when they are loaded, and torch is to tell its own number of threads.
            single = {name: value for name, value in _AT_START.items() if name != "OMP_NUM_THREADS"}
            self._process = subprocess.Popen(
                command, cwd=REPOSITORY, env=single | {"OPENBLAS_NUM_THREADS": "1"}, pass_fds=[theirs.fileno()]
            )

    def is_alive(self) -> bool:
        return self.owner == os.getpid() and self._process.poll() is None

    def fork(self, request: dict[str, Any], files: Sequence[int]) -> int:
        """Have a process forked with these files as its standard ones; returns its number.

        It is forked twice: the one between ends, so that this process, as its subreaper, becomes its parent.
        """
        content = json.dumps(request).encode()
        with self._lock:
            _set_subreaper(True)
            try:
                socket.send_fds(self._channel, [len(content).to_bytes(8, "little")], files)
                self._channel.sendall(content)
                answer = self._channel.recv(8, socket.MSG_WAITALL)
            finally:
                _set_subreaper(False)
        if len(answer) < 8:
            raise RuntimeError("the server that processes are forked from has ended")
        return int.from_bytes(answer, "little")


class _Forked(subprocess.Popen):
    """A process forked from the server, handled as subprocess's own."""

    def __init__(
        self,
        server: _Server,
        command: list[str],
        *,
        cwd: str | os.PathLike | None = None,
        env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
        **pipes: Any,
    ) -> None:
        self._server = server
        self._request = {
            "command": command,
            "cwd": os.path.abspath(cwd or "."),  # noqa: PTH100
            "environment": dict(os.environ if env is None else env),
            "session": start_new_session,
        }
        super().__init__(command, **pipes)

    def _execute_child(self, *given: Any) -> None:
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = given[10:16]
        umask = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask:"))
        state = {
            "umask": int(umask.split()[1], 8),
            "ignored": [int(one) for one in signal.valid_signals() if signal.getsignal(one) == signal.SIG_IGN],
            "blocked": [int(one) for one in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        }
        files = [own if asked == -1 else asked for own, asked in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid = self._server.fork(self._request | state, files)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


_server: _Server | None = None
_starting = threading.Lock()


def _the_server() -> _Server:
    global _server
    with _starting:
        if _server is None or not _server.is_alive():
            _server = _Server()
        return _server


def _set_subreaper(on: bool) -> None:
    """Only while a process is forked: this one is not to be the parent of everything that tests leave behind."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
