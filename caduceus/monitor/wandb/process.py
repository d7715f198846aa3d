"""The trainer's side of W&B: it starts a process that sends, logs its messages, and waits a limited time at the end."""

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, BinaryIO

from caduceus.config import Config
from caduceus.errors import UserError
from caduceus.files import fingerprint, take_lock
from caduceus.monitor.wandb.ends import end_seconds
from caduceus.monitor.wandb.identity import adopt, identity
from caduceus.monitor.wandb.place import place_of
from caduceus.run.directory import RunDirectory

START_SECONDS = 10.0
"""Seconds that a start may wait for W&B with `wandb.required`; otherwise it does not wait."""
_GRACE_SECONDS = 5.0
"""Seconds by which the end of a run waits longer than its sender."""
_ENDING_SECONDS = 5.0
"""Seconds that a killed sender may take to disappear."""
_LEVELS = {"warning": logging.WARNING}
_ROOT = Path(__file__).resolve().parents[3]
"""The folder that holds the package, which may be a copy."""

_log = logging.getLogger(__name__)


class WandbProcess:
    """The process that brings W&B up to metrics.jsonl while this one trains. Where W&B is disabled, it is not started.

    Raises `UserError` where `wandb.required` is true and W&B does not answer within `START_SECONDS`.
    """

    def __init__(self, config: Config, run: Path) -> None:
        self._config, self._run = config, run
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = threading.Event()
        self._trouble: str | None = None
        self._temporary = _temporary_directory(run)
        shutil.rmtree(self._temporary, ignore_errors=True)  # left by a start that was killed
        place = place_of(config, run)
        for line in place.which_won():
            _log.info("wandb: %s", line)
        if place.mode == "disabled":
            if config.wandb.required and config.wandb.mode != "disabled":
                raise UserError(f"wandb.required: is true, but {place.from_environment[0]} turns W&B off; unset it")
            return
        with self._guarded():
            with contextlib.suppress(OSError):  # the disk may be full: the other process reports this, and tries again
                identity(run) if config.wandb.id is None else adopt(run, config.wandb.id)
            self._start()
        if config.wandb.required:
            self._require()

    @property
    def pid(self) -> int | None:
        """The id of the sending process; None where there is none."""
        return self._process.pid if self._process is not None else None

    def end(self, exit_code: int, stopped: bool, reason: str | None) -> None:
        """Let the last rows be sent, and return after at most `end_seconds`, whatever W&B does."""
        if self._process is None:
            return
        with self._guarded():
            message = json.dumps({"exit": exit_code, "stopped": stopped, "reason": reason}) + "\n"
            with contextlib.suppress(OSError):
                self._process.stdin.write(message.encode())
                self._process.stdin.close()
            try:
                self._process.wait(end_seconds(self._config, stopped or exit_code != 0) + _GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                _log.warning(
                    "wandb: the sending process does not end; `python launch/runs.py sync %s` sends the missing data",
                    self._run,
                )
            _kill_session(self._process.pid)
            self._process.wait()
            self._listener.join(1.0)
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _start(self) -> None:
        self._temporary.mkdir(mode=0o700)
        with _client_log(self._run) as client_log:
            self._process = subprocess.Popen(
                [*_command(self._run, self._temporary), "--trainer", str(os.getpid()), "--since", str(time.time())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=client_log,
                env={**_environment(), "TMPDIR": str(self._temporary)},
                start_new_session=True,  # only the trainer handles Ctrl-C and the signals of schedulers
            )
        self._listener = threading.Thread(target=self._listen, args=(self._process,), daemon=True)
        self._listener.start()

    def _listen(self, process: "subprocess.Popen[bytes]") -> None:
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                self._trouble = said.get("trouble", self._trouble)
                if said["level"] == "ready":
                    self._trouble = None
                if said["level"] == "ready" or "trouble" in said:
                    self._ready.set()
                _log.log(_LEVELS.get(said["level"], logging.INFO), "%s", said["text"])
        self._ready.set()

    def _require(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        self._ready.wait(max(0.0, deadline - time.monotonic()))
        trouble = self._trouble
        if self._process is not None and not self._ready.is_set():
            trouble = f"W&B did not start within {START_SECONDS:.0f} s"
        if self._process is None or self._process.poll() is not None:
            trouble = trouble or f"its process ended; {self._run}/wandb/client.log says more"
        if trouble:
            if self._process is not None:
                _kill_session(self._process.pid)
            raise UserError(f"wandb.required: {trouble}; correct this, or start with wandb.required=false")

    @contextlib.contextmanager
    def _guarded(self) -> Any:
        """A context in which no failure of this side ends the run."""
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            _log.warning(
                "wandb: %s; training goes on without it, and `python launch/runs.py sync %s` sends it later",
                text,
                self._run,
            )


def sync(run: RunDirectory) -> int:
    """Send W&B the missing data of a run that no process trains. Returns the exit status: 0 where W&B then has all
    rows.
    """
    (run.path / "wandb").mkdir(exist_ok=True)
    deadline = time.monotonic() + _ENDING_SECONDS
    while not _may_be_sent(run.path):
        if time.monotonic() > deadline:
            raise UserError(f"{run.path}: another process already sends its rows; see {run.path}/wandb/status.json")
        time.sleep(0.1)
    if not run.newest_metrics("step"):
        raise UserError(f"{run.path}: has no rows to send yet")
    temporary = _temporary_directory(run.path)
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    temporary.mkdir(mode=0o700)
    environment = {**_environment(), "TMPDIR": str(temporary)}
    with _client_log(run.path) as client_log:
        process = subprocess.Popen(
            _command(run.path, temporary), stdout=subprocess.PIPE, stderr=client_log, env=environment
        )
        for line in process.stdout:
            with contextlib.suppress(ValueError):
                print(json.loads(line)["text"], flush=True)
    status = process.wait()
    shutil.rmtree(temporary, ignore_errors=True)
    return status


def _may_be_sent(run: Path) -> bool:
    """Whether this process may send a run's rows, as no other does."""
    try:
        take_lock(run / "wandb" / ".sender", wait=False).close()
    except BlockingIOError:
        return False
    return True


def _client_log(run: Path) -> BinaryIO:
    """The file to which W&B's client may print; the null device where the disk is full."""
    with contextlib.suppress(OSError):
        return (run / "wandb" / "client.log").open("wb")
    return Path(os.devnull).open("wb")


def _command(run: Path, temporary: Path) -> list[str]:
    sender = [sys.executable, "-m", "caduceus.monitor.wandb.sender", str(run)]
    return [*sender, "--starter", str(os.getpid()), "--temporary", str(temporary)]


def _environment() -> dict[str, str]:
    # Training sets variables of its W&B service in this process, which the other process must not use.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return {**environment, "OMP_NUM_THREADS": "1"}


def _kill_session(leader: int) -> None:
    """Kill a process and the processes that it started: the client's process has its own session."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int(process.name) == leader or _parent(process) == leader:
                os.kill(int(process.name), signal.SIGKILL)


def _parent(process: Path) -> int:
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])


def _temporary_directory(run: Path) -> Path:
    """The directory in which W&B's client keeps its files while it runs.

    It is the same at every start, so that the files of a killed client are found.
    """
    return Path(tempfile.gettempdir()) / f"caduceus-wandb-{os.getuid()}-{fingerprint(str(run.absolute()))[:12]}"
