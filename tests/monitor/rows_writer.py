"""A start of a run whose rows are made up, in a process that a test can kill: RUN FIRST."""

import sys
import time
from pathlib import Path

from tests.monitor.conftest import STEPS, Watched, make_step


def main() -> None:
    watched, first = Watched(Path(sys.argv[1]), mode="offline"), int(sys.argv[2])
    watched.run.truncate_metrics(first - 1)
    with watched.monitor() as monitor:
        for step in range(first, STEPS + 1):
            make_step(monitor, step)
            time.sleep(0.2)


if __name__ == "__main__":
    main()
