"""The process that tests/preloaded.py forks commands from: python -m tests.preload_server SOCKET ROOM

It imports what commands import, and runs the kernels once, in one thread, as others would not survive a fork. ROOM is
as long as the longest command line that a forked process can show as its own.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import json
import multiprocessing.process
import os
import random
import runpy
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO

IMPORTED = (
    "caduceus.evaluate.commands",
    "caduceus.hub",
    "caduceus.monitor.report",
    "caduceus.train.trainer",
    "data_prep.write.sharding",
    "launch.check",
    "launch.submission",
)


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    search = sys.path[1:]  # modules add to it
    threads = preload()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those who asked
    if request := forked(channel):
        become(request, threads, search)
        execute(request["command"][1:])


def preload() -> int:
    """Import and warm up; returns torch's own number of threads."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in IMPORTED:
        importlib.import_module(name)
    from caduceus import CaduceusConfig, CaduceusForMaskedLM

    sizes = CaduceusConfig(d_model=8, n_layer=1, d_state=2, rcps=True)
    for dtype in (torch.float32, torch.float64):
        model = CaduceusForMaskedLM(sizes, backend="cpu").to(dtype)
        model(torch.full((1, 8), 7), torch.full((1, 8), 7), return_logits=False).loss.backward()
        torch.optim.AdamW(model.parameters()).step()
    if len(list(Path("/proc/self/task").iterdir())) > 1:
        raise RuntimeError("a module that is imported before processes are forked has started a thread")
    gc.collect()
    gc.freeze()  # neither a collection nor the end of a forked process looks through all that was imported
    atexit.register(close_stderr)
    return threads


def close_stderr() -> None:
    """The last of what runs at exit: Triton's library would tell of all that was frozen, as leaked."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def forked(channel: socket.socket) -> dict[str, Any] | None:
    """Fork a process for each request, in which this returns it; returns None when there will be no more."""
    while True:
        size, files, _, _ = socket.recv_fds(channel, 8, 3)
        if len(size) < 8:
            return None
        request = json.loads(channel.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL))
        number, tell_number = os.pipe()
        start, tell_start = os.pipe()
        between = os.fork()
        if between == 0:
            process = os.fork()
            if process:
                os.write(tell_number, process.to_bytes(8, "little"))
                os._exit(0)
            os.close(tell_start)
            os.read(start, 1)  # until the one between has ended, and this one has the parent that it will have
            channel.close()
            for target, file in enumerate(files):
                os.dup2(file, target)
            return request
        os.close(tell_number)
        os.waitpid(between, 0)
        process = os.read(number, 8)
        for file in (number, start, tell_start, *files):
            os.close(file)
        channel.sendall(process)


def become(request: dict[str, Any], threads: int, search: list[str]) -> None:
    """Take on what a fresh process would have from its parent and by itself."""
    import numpy as np
    import torch

    if request["session"]:
        os.setsid()
    for file in [int(link.name) for link in Path("/proc/self/fd").iterdir()]:
        if file > 2:
            with contextlib.suppress(OSError):  # that of the list
                os.close(file)
    os.umask(request["umask"])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    open_streams()
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        ignored = number in request["ignored"] or number in (signal.SIGPIPE, signal.SIGXFSZ)
        own = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if ignored else own)
    random.seed()
    np.random.seed()
    torch.seed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or threads))
    multiprocessing.process.ORIGINAL_DIR = request["cwd"]
    multiprocessing.process.current_process().authkey = os.urandom(32)
    sys.orig_argv = request["command"]
    show_command(request["command"])
    first = list(filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))
    sys.path[:] = [*first, *(entry for entry in search if entry not in first)]
    importlib.invalidate_caches()
    with warnings.catch_warnings():
        pass  # what has been said once is forgotten
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])


def show_command(command: list[str]) -> None:
    """Have /proc and ps show it in the place of the server's, whose words are overwritten."""
    first, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    words = b"".join(os.fsencode(word) + b"\0" for word in command)[: end - first - 1]
    ctypes.memmove(first, words.ljust(end - first, b"\0"), end - first)


def open_streams() -> None:
    """Standard streams as Python opens them, unbuffered where this process was told so."""

    def stream(number: int, like: TextIO, line_buffering: bool) -> TextIO:
        buffering = 0 if like.write_through else -1
        binary = open(number, "wb" if number else "rb", buffering=buffering, closefd=False)  # noqa: SIM115
        through = {"line_buffering": line_buffering and buffering != 0, "write_through": like.write_through}
        return io.TextIOWrapper(binary, like.encoding, like.errors, **through)

    sys.stdin = sys.__stdin__ = stream(0, sys.stdin, False)
    sys.stdout = sys.__stdout__ = stream(1, sys.stdout, os.isatty(1))
    sys.stderr = sys.__stderr__ = stream(2, sys.stderr, True)


def execute(arguments: list[str]) -> None:
    """What `python ARGUMENTS` does; ends the process."""
    if arguments[0] == "-m":
        module, sys.argv = arguments[1], arguments[1:]
        sys.path.insert(0, str(Path.cwd()))
        if not hasattr(sys.modules.get(module), "__path__"):
            sys.modules.pop(module, None)  # it is not said to have been imported before
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    main()
