"""python -m caduceus.monitor.wandb.sender RUN …: brings W&B up to a run's metrics.jsonl, beside a trainer until it
ends.

It talks to the process that started it in lines of JSON on stdout, and learns of the trainer's end from stdin. Every
attempt with W&B's client begins in a fresh process image, so that nothing is left of a failed one.
"""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from caduceus.errors import UserError
from caduceus.files import take_lock
from caduceus.monitor.following import Follower
from caduceus.monitor.wandb.account import base_url, key, no_key
from caduceus.monitor.wandb.clients import Watch, kill_clients
from caduceus.monitor.wandb.ends import end_seconds, finish_seconds, is_early, sends_files
from caduceus.monitor.wandb.facts import facts_of, fitting
from caduceus.monitor.wandb.happenings import Happenings
from caduceus.monitor.wandb.history import is_for_wandb
from caduceus.monitor.wandb.identity import Status, directory, identity, keep_status, keep_url, renewed
from caduceus.monitor.wandb.journal import Journal, StaleError, is_whole, never_sent, newest_step, send, sent_path
from caduceus.monitor.wandb.place import Place, place_of
from caduceus.monitor.wandb.server import Server, ServerTroubleError
from caduceus.run.directory import RunDirectory

_POLL_SECONDS = 0.3
_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 60.0
"""Seconds between two checks of the server, and between two attempts after a failure; doubled each time."""
_LOST_SECONDS = 150.0
"""Seconds after which a client counts as lost if it sends nothing although the server answers and steps wait."""
_BEGIN_SECONDS = 75.0
"""Seconds that an attempt may take to begin: the client has 30 s, and the server is asked before it."""
_PREEMPTED = 75
"""The exit status of a trainer that stopped early: W&B would call a preempting run that ends with 0 finished."""
_MEMORY = "CADUCEUS_WANDB_SENDER"
"""The environment variable in which an attempt passes values on to the next one."""


class Sender:
    """Brings W&B up to metrics.jsonl, attempt after attempt."""

    def __init__(self, run: RunDirectory, trainer: int | None, since: float, messages: int) -> None:
        self._run = run
        self._trainer = trainer
        self._messages = messages
        memory = json.loads(os.environ.pop(_MEMORY, "{}"))
        self._told: list[str] = memory.get("told", [])
        self._attempt: int = memory.get("attempt", 0)
        self._back_to: int | None = memory.get("back_to")
        self._end: dict[str, Any] | None = memory.get("end", {"exit": None} if trainer is None else None)
        self._ended_at = memory.get("ended_at", time.time() if trainer is None else None)
        self._since = since
        self._was_sending = False
        self._status = Status("starting")
        self._config = run.config()
        self.place: Place = fitting(place_of(self._config, run.path))

    def listen(self) -> None:
        """Wait for the trainer's end in the background; after it, there are `end_seconds` for the last rows."""
        if self._trainer is not None and self._end is None:
            threading.Thread(target=self._await_end, daemon=True).start()

    def bring_up(self) -> int:
        """Send the missing data until the run has ended. Returns the exit status: 0 where W&B has all rows."""
        from caduceus.monitor.wandb import session  # this imports the client's library, which takes long

        beginning = Watch(self._lose_client, _BEGIN_SECONDS)
        try:
            session.start_client()
            self._work(self._mode(), beginning)
        except StaleError as stale:
            self._again(back_to=stale.args[0])
        except Exception as error:
            beginning.stop()
            self._trouble(error)
        return 0 if self._status.state in ("complete", "offline") else 1

    def tell(self, level: str, text: str, **facts: Any) -> None:
        """Send a message to the process that started this one, each message once."""
        if text in self._told:
            return
        self._told.append(text)
        line = json.dumps({"level": level, "text": text, **facts}) + "\n"
        try:
            os.write(self._messages, line.encode())
        except OSError:  # the other process no longer listens
            return

    def _command(self) -> str:
        return f"`python launch/runs.py sync {self._run.path}`"

    def _mode(self) -> str:
        if self._trainer is None:
            return "online"
        if self.place.mode != "auto":
            return self.place.mode
        return "online" if key() is not None else "offline"

    def _lose_client(self, reason: str) -> None:
        """Abort the thread that waits for the client."""
        self._trouble(RuntimeError(reason))
        kill_clients()
        os._exit(1)

    def _work(self, mode: str, beginning: Watch) -> None:
        from caduceus.monitor.wandb import offline, session

        which, place = identity(self._run.path), self.place
        server = None
        if mode == "online":
            server = Server(base_url(), key() or no_key())
            entity = place.entity or server.entity()
            last = server.last_step(entity, place.project, which.id)
        else:
            folder = place.directory / "wandb"
            # Later steps were undone by a kill or a rewind, and are made again.
            offline.drop_steps_after(folder, which.id, newest_step(self._run))
            self._back_to = None
            last = offline.last_step(folder, which.id)
        journal = Journal(sent_path(self._run.path), last or 0)
        chosen = server is not None and which.id == self._config.wandb.id and which.url is None
        is_anothers = chosen and bool(last) and never_sent(self._run.path)
        begun = None if is_anothers else self._begin(mode, which.id)
        if begun is None:  # the W&B run of this id cannot be brought up to metrics.jsonl
            which = renewed(self._run.path)
            undone = "holds undone steps, which this server cannot remove"
            why = "was deleted" if self._back_to is None else undone
            why = "has the steps of another run" if is_anothers else why
            text = f"wandb: run {which.former[-1]} {why}; the run goes on as {which.id}, from its first step"
            self.tell("warning", text)
            self._back_to = None
            journal = Journal(sent_path(self._run.path), 0)
            begun = session.Session(self._run.path, place, which.id, mode, self._facts(), self._trainer)
        if self._back_to is not None:
            journal.drop_after(self._back_to)
            self._back_to = None
        keep_url(self._run.path, begun.url)
        if server is not None:
            self.tell("ready", f"wandb: {begun.url}", url=begun.url)
        self._keep("online" if server else "offline", journal.last)
        if server is None:
            why = "not logged in to W&B, so " if self.place.mode == "auto" else ""
            text = f"wandb: {why}run {which.id} is kept offline in {folder}; {self._command()} sends it"
            self.tell("ready", text)
        self._was_sending = True
        beginning.stop()
        self._follow(begun, journal, server, lambda: server.last_step(begun.entity, place.project, which.id))

    def _begin(self, mode: str, run_id: str) -> Any:
        """Start W&B's client; None where this id cannot be continued."""
        from caduceus.monitor.wandb import session

        try:
            return session.Session(
                self._run.path, self.place, run_id, mode, self._facts(), self._trainer, self._back_to
            )
        except session.IdTakenError:
            return None
        except Exception:
            if self._back_to is None:
                raise
            return None

    def _follow(self, begun: Any, journal: Journal, server: Any, server_step: Any) -> None:
        follower = Follower(self._run.metrics_path, lambda: journal.first_unsent(self._run.metrics_path))
        held, looked, pause = {}, time.monotonic(), _FIRST_PAUSE
        seen, moved = journal.last, time.monotonic()
        happenings = Happenings(self._run.path, journal.last, self._since)
        alert, every = begun.alert if self._config.wandb.alerts else None, self._config.wandb.log_every
        while True:
            end = self._end
            rows = follower.poll()
            happenings.poll(alert)
            held = {} if follower.restarted else held
            for row in rows:
                if held and row["step"] != held["step"]:
                    if is_for_wandb(held, every):
                        send(begun, journal, held, happenings.markers)
                    held = {}
                held.update(row)
            if end is not None:
                break
            if server is not None and time.monotonic() - looked > pause:
                has = self._look(server_step)
                if has is None or has != seen or has >= journal.last - 1:
                    seen, moved = has, time.monotonic()
                elif time.monotonic() - moved > _LOST_SECONDS:
                    raise RuntimeError("W&B's client no longer sends anything")
                looked, pause = time.monotonic(), min(2 * pause, _LONGEST_PAUSE)
            time.sleep(_POLL_SECONDS)
        if held and is_whole(self._run, held["step"], end, self._config.train.steps):
            send(begun, journal, held, happenings.markers)
        if end.get("exit") == 0 and not end.get("stopped") and held and journal.last > held["step"]:
            raise StaleError(held["step"])
        stopped, early = bool(end.get("stopped")), is_early(end, self._trainer)
        if server is not None:
            server.entity()  # a failing server would delay the client's end for long
        if trouble := begun.leave_artifacts(self._run, self._config, sends_files(self._config, early)):
            self.tell("warning", trouble)
        exit_code = end["exit"] if end.get("exit") is not None else int(self._trainer is not None)
        exit_code = _PREEMPTED if stopped else exit_code
        finishing = threading.Thread(target=begun.finish, args=(exit_code, stopped, end.get("reason")), daemon=True)
        finishing.start()
        finishing.join(finish_seconds(self._config, early))
        if finishing.is_alive():
            raise ServerTroubleError(f"{base_url()} accepts no rows")
        if server is None:
            self._keep("offline", journal.last)
            return
        for _ in range(10):
            if (server_step() or 0) >= journal.last:
                self._keep("complete", journal.last)
                if self._trainer is None:
                    self.tell("info", f"wandb: has every step up to {journal.last:,}: {begun.url}")
                return
            time.sleep(0.5)
        raise RuntimeError(f"W&B has not accepted the steps up to {journal.last}")

    def _look(self, server_step: Any) -> int | None:
        """The newest step that the server has; None where it fails, which is reported."""
        try:
            has = server_step() or 0
        except ServerTroubleError as error:
            self._warn(error)
            self._keep("waiting", self._status.step, str(error))
            return None
        if self._status.state == "waiting":
            self.tell("info", "wandb: the server answers again and is sent the missing data")
        self._keep("online", has)
        return has

    def _facts(self) -> dict[str, Any]:
        facts, cut = facts_of(self._run, self._config)
        if cut:
            level = "warning" if any(not name.startswith("start.") for name in cut) else "info"
            text = f"wandb: {', '.join(cut)}: too long for W&B, which gets the beginning; {self._run.path} has all"
            self.tell(level, text)
        return facts

    def _trouble(self, error: Exception) -> None:
        self._warn(error)
        has = self._status.step
        in_vain = self._attempt > 3 or isinstance(error, (ServerTroubleError, UserError))
        if self._end is not None and in_vain:
            self._keep("behind", has, str(error))
            return
        self._keep("waiting", has, str(error))
        pause = time.monotonic() + min(_FIRST_PAUSE * 2**self._attempt, _LONGEST_PAUSE)
        while time.monotonic() < pause and self._end is None:
            time.sleep(_POLL_SECONDS)
        self._attempt = self._attempt + 1 if not self._was_sending or self._end else 1
        self._again(back_to=self._back_to)

    def _warn(self, error: Exception) -> None:
        text = " ".join(str(error).split()) or type(error).__name__
        goes_on = "training goes on, metrics.jsonl keeps every row, and " if self._trainer is not None else ""
        when = "when it can be, or " if self._trainer is not None else ""
        later = f"{goes_on}W&B is sent what it lacks {when}by {self._command()}"
        self.tell("warning", f"wandb: {text}; {later}", trouble=text)

    def _keep(self, state: str, step: int, trouble: str | None = None) -> None:
        self._status = Status(state, step, trouble)
        with contextlib.suppress(OSError):  # the disk may be full: only the status is lost
            self._status = Status(state, step, trouble, identity(self._run.path).url)
            keep_status(self._run.path, self._status)

    def _again(self, back_to: int | None) -> NoReturn:
        """Replace this process's image by a fresh start."""
        kill_clients()
        memory = {"told": self._told, "attempt": self._attempt, "back_to": back_to}
        if self._trainer is not None:
            memory |= {"end": self._end, "ended_at": self._ended_at}
        os.environ[_MEMORY] = json.dumps(memory)
        os.environ.pop("WANDB_SERVICE", None)
        os.dup2(self._messages, 1)
        os.execv(sys.executable, [sys.executable, "-m", "caduceus.monitor.wandb.sender", *sys.argv[1:]])

    def _await_end(self) -> None:
        end: dict[str, Any] = {"exit": None, "reason": "the trainer was killed"}
        heard = b""
        os.set_blocking(0, False)
        while os.getppid() == self._trainer:
            try:
                piece = os.read(0, 65536)
                heard += piece
                if b"\n" in heard:
                    end = json.loads(heard)
                    break
                if not piece:
                    break
            except BlockingIOError:
                time.sleep(_POLL_SECONDS)
        self._ended_at = time.time()
        self._end = end

    def deadline(self) -> None:
        """End this process if the last rows take too long."""
        threading.Thread(target=self._enforce, daemon=True).start()

    def _enforce(self) -> None:
        while self._end is None or self._ended_at is None:
            time.sleep(_POLL_SECONDS)
        seconds = end_seconds(self._config, is_early(self._end, self._trainer))
        time.sleep(max(0.0, self._ended_at + seconds - time.time()))
        self._warn(RuntimeError(f"W&B has not accepted everything within {seconds:.0f} s"))
        self._keep("behind", self._status.step, "W&B is slow")
        kill_clients()
        os._exit(1)


def main() -> int:
    """Send until the run has ended, or once. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m caduceus.monitor.wandb.sender")
    parser.add_argument("run", type=Path)
    parser.add_argument("--trainer", type=int)
    parser.add_argument("--starter", type=int, help="id of the process that starts this one")
    parser.add_argument("--temporary", type=Path, help="folder that is removed at the end if the starter is gone")
    parser.add_argument("--since", type=float, default=math.inf, help="seconds since the epoch of the trainer's start")
    arguments = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the trainer gets these signals too, and this process ends after it
    messages = os.dup(1)
    os.dup2(2, 1)  # output of W&B's client must not reach the user's terminal
    run = RunDirectory.open(arguments.run)
    sender = Sender(run, arguments.trainer, arguments.since, messages)
    sender.listen()
    sender.deadline() if arguments.trainer is not None else None
    directory(run.path).mkdir(parents=True, exist_ok=True)
    try:
        with take_lock(directory(run.path) / ".sender", wait=arguments.trainer is not None):
            return sender.bring_up()
    finally:
        kill_clients()
        if os.getppid() != arguments.starter:  # otherwise the starter removes it
            shutil.rmtree(arguments.temporary, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
