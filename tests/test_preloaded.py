"""What is forked from a process that has imported everything is as a process that was started afresh."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import preloaded
from tests.conftest import REPOSITORY

TOLD = REPOSITORY / "tests" / "told_state.py"


def both(command: list[Any], **options: Any) -> list[subprocess.CompletedProcess]:
    """The command's ends: forked, then fresh."""
    environment = preloaded._the_server().environment
    assert not preloaded.changed_at_start(options.get("env") or os.environ, environment)
    assert preloaded.is_served([os.fspath(word) for word in command], options, environment)
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [start(command, input="", **options) for start in (preloaded.run, subprocess.run)]


@pytest.mark.moderate
@pytest.mark.parametrize(
    ("how", "session"), [([TOLD], False), (["-m", "tests.told_state"], True)], ids=["script", "module"]
)
def test_a_forked_process_is_given_what_a_fresh_one_is(tmp_path: Path, how: list[Any], session: bool) -> None:
    """Folder, variables, streams, umask, signals, parent and session, and children that multiprocessing spawns."""
    environment = {**os.environ, "ADDED": "1", "OMP_NUM_THREADS": "2", "PYTHONPATH": str(REPOSITORY)}
    umask, interrupt = os.umask(0o037), signal.signal(signal.SIGQUIT, signal.SIG_IGN)
    try:
        command = [sys.executable, *how, "tell", "b c"]
        forked, fresh = both(command, cwd=tmp_path, env=environment, start_new_session=session)
    finally:
        os.umask(umask)
        signal.signal(signal.SIGQUIT, interrupt)
    assert (forked.returncode, forked.stderr) == (fresh.returncode, fresh.stderr) == (0, "")
    told, expected = json.loads(forked.stdout), json.loads(fresh.stdout)
    assert told["environment"].pop("GOMP_SPINCOUNT", None) == expected["environment"].pop("GOMP_SPINCOUNT", None)
    assert told == expected
    assert told["parent"] == os.getpid() and told["umask"] == 0o037 and told["spawned"] == 9
    assert told["session"] == (0 if session else os.getsid(0))


@pytest.mark.moderate
def test_statuses_and_messages_are_those_of_a_fresh_process() -> None:
    for words, status in (["exit", "75"], 75), (["fail"], 1):
        forked, fresh = both([sys.executable, TOLD, *words])
        assert forked.returncode == fresh.returncode == status
        assert forked.stdout == fresh.stdout
        assert forked.stderr.splitlines()[-1:] == fresh.stderr.splitlines()[-1:]


@pytest.mark.moderate
def test_two_of_them_draw_other_random_numbers() -> None:
    command = [sys.executable, TOLD, "random"]
    drawn = [preloaded.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2)]
    assert not set(drawn[0]) & set(drawn[1])


@pytest.fixture
def heeding_signals() -> Iterator[None]:
    """Signals are not ignored, as they are in what a shell runs in the background, and so in its children."""
    before = [
        (number, signal.signal(number, own))
        for number, own in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL))
    ]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.moderate
@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, -2)])
def test_it_is_killed_and_waited_for_as_any_child(number: int, status: int, heeding_signals: None) -> None:
    command = [sys.executable, TOLD, "sleep"]
    with preloaded.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "sleeps\n" and process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.send_signal(number)
        process.communicate(timeout=30)
    assert process.returncode == status
    assert not Path(f"/proc/{process.pid}").exists()


@pytest.mark.moderate
def test_what_tests_leave_behind_does_not_become_ours() -> None:
    """It would stay a zombie, and who looks whether it has ended would wait for good."""
    preloaded.run([sys.executable, TOLD, "exit", "0"], check=True)
    shell = subprocess.run(["sh", "-c", "sleep 0.1 & echo $!"], capture_output=True, text=True, check=True)
    time.sleep(0.2)
    with pytest.raises(ChildProcessError):
        os.waitpid(int(shell.stdout), os.WNOHANG)


TRAIN = [sys.executable, "-m", "caduceus.train"]
PLAIN = {"HOME": "/home"}


@pytest.mark.parametrize(
    ("command", "options", "served"),
    [
        (TRAIN, {}, True),
        (TRAIN, {"env": {**PLAIN, "RANK": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}}, True),
        ([sys.executable, "launch/slurm.py"], {"cwd": REPOSITORY}, True),
        (["python3", *TRAIN[1:]], {}, False),
        ([sys.executable, "-X", "importtime", *TRAIN[1:]], {}, False),
        ([sys.executable, "-c", "import caduceus.train"], {}, False),
        ([sys.executable, "-m", "torch.distributed.run"], {}, False),
        ([sys.executable, "/elsewhere/run.py"], {}, False),
        (TRAIN, {"env": {**PLAIN, "PYTHONPATH": "/elsewhere"}}, False),
        (TRAIN, {"env": {**PLAIN, "TRITON_INTERPRET": "1"}}, False),
        (TRAIN, {"env": {**PLAIN, "PYTHONUNBUFFERED": "1"}}, False),
        (TRAIN, {"preexec_fn": os.getpid}, False),
    ],
)
def test_what_depends_on_its_start_starts_afresh(command: list[str], options: dict[str, Any], served: bool) -> None:
    assert preloaded.is_served(command, {"env": PLAIN, **options}, PLAIN) is served


def test_a_folder_with_a_copy_of_the_code_is_run_from_there(tmp_path: Path) -> None:
    (tmp_path / "caduceus").mkdir()
    assert not preloaded.is_served(TRAIN, {"env": PLAIN, "cwd": tmp_path}, PLAIN)
