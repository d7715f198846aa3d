"""The trainer's side of W&B: a process that sends, its messages in the log, and a bounded wait at the end."""

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
"""How long a start may wait for W&B where `wandb.required` asks for it; others do not wait."""
_GRACE_SECONDS = 5.0
"""How much longer than its sender the end of a run waits."""
_ENDING_SECONDS = 5.0
"""How long a sender that was killed may take to be gone."""
_LEVELS = {"warning": logging.WARNING}
_ROOT = Path(__file__).resolve().parents[3]
"""The folder that holds the package, which may be a copy."""

_log = logging.getLogger(__name__)


class WandbProcess:
    """The process that brings W&B up to metrics.jsonl while this one trains. Not started where W&B is disabled.

    Raises `UserError` where `wandb.required` is true and W&B does not answer within `START_SECONDS`.
    """

    def __init__(self, config: Config, run: Path) -> None:
        self._config, self._run = config, run
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = threading.Event()
        self._trouble: str | None = None
        self._temporary = _temporary_directory(run)
        shutil.rmtree(self._temporary, ignore_errors=True)  # of a start that was killed
        place = place_of(config, run)
        for variable in place.from_environment:
            _log.info("wandb: %s holds, as the configuration does not set it", variable)
        if place.mode == "disabled":
            if config.wandb.required and config.wandb.mode != "disabled":
                raise UserError(f"wandb.required: is true, but {place.from_environment[0]} turns W&B off; unset it")
            return
        with self._guarded():
            with contextlib.suppress(OSError):  # a full disk: the other process says so, and tries again
                identity(run) if config.wandb.id is None else adopt(run, config.wandb.id)
            self._start()
        if config.wandb.required:
            self._require()

    @property
    def pid(self) -> int | None:
        """Id of the process that sends; None where there is none."""
        return self._process.pid if self._process is not None else None

    def end(self, exit_code: int, stopped: bool, reason: str | None) -> None:
        """Let the last rows be sent, and leave after `end_seconds` at the most, whatever W&B does."""
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
                _log.warning("wandb: does not end; `python launch/runs.py sync %s` sends what it lacks", self._run)
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
                start_new_session=True,  # Ctrl-C and the signals of schedulers are for the trainer
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
            trouble = f"W&B has not begun within {START_SECONDS:.0f} s"
        if self._process is None or self._process.poll() is not None:
            trouble = trouble or f"its process ended; {self._run}/wandb/client.log says more"
        if trouble:
            if self._process is not None:
                _kill_session(self._process.pid)
            raise UserError(f"wandb.required: {trouble}; mend it, or start with wandb.required=false")

    @contextlib.contextmanager
    def _guarded(self) -> Any:
        """No fault of this side's ends the run."""
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
    """Send W&B what it lacks of a run that nobody trains; returns the exit status, 0 where W&B then has all rows."""
    (run.path / "wandb").mkdir(exist_ok=True)
    deadline = time.monotonic() + _ENDING_SECONDS
    while not _may_be_sent(run.path):
        if time.monotonic() > deadline:
            raise UserError(f"{run.path}: its rows are being sent already; see {run.path}/wandb/status.json")
        time.sleep(0.1)
    if not run.newest_metrics("step"):
        raise UserError(f"{run.path}: has no rows to send yet")
    temporary = _temporary_directory(run.path)
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
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
    """Whether no other process sends a run's rows."""
    try:
        take_lock(run / "wandb" / ".sender", wait=False).close()
    except BlockingIOError:
        return False
    return True


def _client_log(run: Path) -> BinaryIO:
    """Where W&B's client may print; nowhere, where the disk takes nothing more."""
    with contextlib.suppress(OSError):
        return (run / "wandb" / "client.log").open("wb")
    return Path(os.devnull).open("wb")


def _command(run: Path, temporary: Path) -> list[str]:
    sender = [sys.executable, "-m", "caduceus.monitor.wandb.sender", str(run)]
    return [*sender, "--starter", str(os.getpid()), "--temporary", str(temporary)]


def _environment() -> dict[str, str]:
    # A training in this process leaves word of its W&B service, which the other would share.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
    return {**environment, "OMP_NUM_THREADS": "1"}


def _kill_session(leader: int) -> None:
    """End what is left of a process and those it started: its client's process leads a session of its own."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int(process.name) == leader or _parent(process) == leader:
                os.kill(int(process.name), signal.SIGKILL)


def _parent(process: Path) -> int:
    return int((process / "stat").read_text().rpartition(")")[2].split()[1])


def _temporary_directory(run: Path) -> Path:
    """The directory in which W&B's client keeps its files while it runs.

    It is the same at every start, so that what a killed client left is found.
    """
    return Path(tempfile.gettempdir()) / f"caduceus-wandb-{os.getuid()}-{fingerprint(str(run.absolute()))[:12]}"
