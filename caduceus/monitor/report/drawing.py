"""python -m caduceus.monitor.report.drawing RUN STEP: draws the worst and best windows of a validation.

It removes the drawings of older validations; their records stay.
"""

import argparse
import contextlib
import os
from pathlib import Path

from caduceus.errors import UserError, run_command
from caduceus.files import write_atomically
from caduceus.monitor.windows import DRAWN, folder_of, picture_name, windows_of
from caduceus.patience import listed

_KEPT = 3
"""Number of newest validations whose drawings are kept."""


def draw(run: Path, step: int) -> None:
    """Draw the windows of a validation as PNGs beside their record, and remove drawings of older ones."""
    try:
        from caduceus.monitor.report.figures import to_png
        from caduceus.monitor.report.tracks import draw_window
    except ImportError as error:
        raise UserError(f"matplotlib cannot be imported ({error}); install it: pip install matplotlib") from None
    folder = folder_of(run, step)
    for window in windows_of(run, step):
        write_atomically(folder / picture_name(window), to_png(draw_window(window)))
    (folder / DRAWN).touch()
    for old in listed(run / "windows", "step-*")[:-_KEPT]:
        for path in [old / DRAWN, *listed(old, "*.png")]:
            with contextlib.suppress(OSError):
                path.unlink()


def main() -> int:
    """Draw the windows. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m caduceus.monitor.report.drawing")
    parser.add_argument("run", type=Path)
    parser.add_argument("step", type=int)
    arguments = parser.parse_args()
    os.nice(10)  # lower priority than the trainer's
    draw(arguments.run, arguments.step)
    return 0


if __name__ == "__main__":
    run_command(main)
