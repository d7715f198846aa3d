"""The worst and best windows of validations: saved in RUN/windows/step-00001000/windows.json, and drawn beside it.

A separate process draws them, so that matplotlib does not delay the trainer.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

from caduceus.files import dump_json, write_atomically

RECORD, DRAWN = "windows.json", "drawn"
_END_SECONDS = 30.0
_ROOT = Path(__file__).resolve().parents[2]

_log = logging.getLogger(__name__)


def folder_of(run: Path, step: int) -> Path:
    """The folder of the windows of a validation."""
    return run / "windows" / f"step-{step:08d}"


def windows_of(run: Path, step: int) -> list[dict[str, Any]]:
    """The records of a validation's windows; empty where there are none, or they cannot be read."""
    try:
        return json.loads((folder_of(run, step) / RECORD).read_text())
    except (OSError, ValueError):
        return []


def picture_name(window: dict[str, Any]) -> str:
    """The file name of a window's drawing: species, kind, and rank within the kind."""
    species = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in window["species"])
    return f"{species}-{window['kind']}-{window['place']}.png"


class Drawing:
    """Saves the windows of validations and draws them in the background. A failure of it does not end the run."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._process: subprocess.Popen[bytes] | None = None

    def keep(self, step: int, windows: list[dict[str, Any]]) -> None:
        """Save the records of a validation, and start drawing them."""
        folder = folder_of(self._run, step)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / DRAWN).unlink(missing_ok=True)
            write_atomically(folder / RECORD, dump_json(windows))
            self._give_up()
            command = [sys.executable, "-m", "caduceus.monitor.report.drawing", str(self._run.resolve()), str(step)]
            self._process = subprocess.Popen(
                command,
                cwd=_ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        except OSError as error:
            _log.warning("%s: the windows of the validation could not be drawn (%s)", folder, error.strerror)

    def end(self, wait: bool) -> None:
        """Wait for the last drawings, or give them up."""
        if self._process is None or not wait:
            self._give_up()
            return
        try:
            _, said = self._process.communicate(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._give_up()
            _log.warning("%s: not drawn within %.0f s", self._run / "windows", _END_SECONDS)
            return
        if self._process.returncode:
            last = said.decode(errors="replace").strip().splitlines() or [f"status {self._process.returncode}"]
            _log.warning("%s: not drawn: %s", self._run / "windows", last[-1])

    def _give_up(self) -> None:
        """End a process that still draws: its drawings are outdated or no longer needed."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
