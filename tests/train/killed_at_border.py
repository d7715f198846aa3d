"""Trains like `python -m caduceus.train`, but is killed where a stage ends: CONFIG MOMENT

MOMENT: `saving`, before the stage's last checkpoint counts, on the rank that completes it; `saved`, as the next stage
begins, on every rank; `never`.
"""

import os
import signal
import sys
from typing import Any

from caduceus.config import load_config
from caduceus.errors import run_command
from caduceus.run.directory import RunDirectory
from caduceus.train import trainer


def killed(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> int:
    path, moment = sys.argv[1:]
    if moment == "saving":
        RunDirectory.complete_checkpoint = killed
    elif moment == "saved":
        trainer.open_stage = killed
    return trainer.train(load_config(path))


if __name__ == "__main__":
    run_command(main)
