"""Trains like `python -m caduceus.train`, and writes which samples every step consumed: CONFIG RECORD_FILE."""

import json
import logging
import os
import sys
from collections.abc import Iterator

from caduceus.config import load_config
from caduceus.data.loader import Batch
from caduceus.errors import run_command
from caduceus.train import loop, trainer


def record(path: str) -> None:
    step_of_the_trainer = loop.training_step

    def recording_step(config, strategy, loader, batches, progress, **handed):
        seen: list[int] = []

        def passing_by() -> Iterator[Batch]:
            for batch in batches:
                seen.extend(batch.g.tolist())
                yield batch

        row = step_of_the_trainer(config, strategy, loader, passing_by(), progress, **handed)
        with open(path, "a") as file:  # noqa: PTH123
            file.write(json.dumps({"step": progress.step, "samples": seen}) + "\n")
            file.flush()
            os.fsync(file.fileno()) if path != os.devnull else None
        return row

    loop.training_step = recording_step


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    record(sys.argv[2])
    return trainer.train(load_config(sys.argv[1]))


if __name__ == "__main__":
    run_command(main)
