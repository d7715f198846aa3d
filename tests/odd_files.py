"""Processes behind a file system that delays, shows new names late and fails for a moment: tests/odd_files.c."""

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

SOURCE = REPOSITORY / "tests" / "odd_files.c"


def compiled(folder: Path) -> Path:
    """The library to preload; skips where there is no compiler, or the folder's file system cannot tell nodes apart."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler, which the library in front of the file system needs")
    try:
        os.setxattr(folder, "user.odd", b"a:0")
    except OSError as error:
        pytest.skip(f"{folder}: its file system has no extended attributes ({error.strerror})")
    library = folder / "odd_files.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def run_behind(library: Path, folder: Path, module: str, *arguments: object, late: int, faults: int) -> Counter[str]:
    """Run a module of tests with `folder` behind the library, on node `a`; what went wrong on the way, counted.

    One in `faults` opens, stats and reads fails, and other nodes see a name `late` milliseconds late.
    """
    log = library.with_name("faults")
    log.unlink(missing_ok=True)
    odd = {"FOLDER": folder, "NODE": "a", "DELAY": 20, "LATE": late, "FAULTS": faults, "LOG": log}
    environment = {**os.environ, **{f"ODD_{name}": str(value) for name, value in odd.items()}}
    environment |= {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return Counter(line.split()[0] for line in log.read_text().splitlines())


def on_nodes(work: list[tuple[str, Callable[[], object]]]) -> None:
    """Do all of it at once, each in a process that is forked from this one, on the node named with it."""
    fork = multiprocessing.get_context("fork")

    def on_node(node: str, one: Callable[[], object]) -> None:
        os.environ["ODD_NODE"] = node
        one()

    processes = [fork.Process(target=on_node, args=each) for each in work]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * len(work)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])
