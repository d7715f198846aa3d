"""python -m caduceus.monitor RUN [RUN …]: the state of runs that train elsewhere, from their directories alone.

In a terminal it shows a panel per run and follows the runs until Ctrl-C; elsewhere it prints a line per run. With
--report FILE it writes one HTML page instead. `dashboard` instead of runs makes a workspace in W&B.
"""

import contextlib
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from caduceus.arguments import Parser
from caduceus.errors import UserError, run_command
from caduceus.monitor.following import Follower
from caduceus.monitor.report.write import write_report
from caduceus.monitor.terminal import panel, plain_line
from caduceus.monitor.view import View
from caduceus.monitor.wandb import dashboard
from caduceus.run.directory import RunDirectory

_POLL_SECONDS = 1.0
_START = """
Shows how runs stand, from their directories, also while they train on another machine. To begin:

  {caduceus-monitor} runs/ps-1k  # follows it in a terminal
  {caduceus-monitor} runs/ps-1k runs/ph-1k --report report.html  # one page of curves, and of what differs
  {caduceus-monitor} dashboard --help  # a workspace of W&B
"""


class Followed:
    """A run that another process trains, perhaps on another machine."""

    def __init__(self, path: Path) -> None:
        """Open the run. Raises `UserError` where there is none."""
        run = RunDirectory.open(path)
        config = run.config()
        self.view = View.of(run, path.resolve().name, config)
        self._follower = Follower(run.metrics_path, self.view.recall)

    def poll(self) -> None:
        """Take in the rows that were added since the last call."""
        for row in self._follower.poll():
            self.view.take(row)
        self.view.look()


def main() -> int:
    """Show the runs. Returns the exit status."""
    if sys.argv[1:2] == ["dashboard"]:
        return dashboard.main(sys.argv[2:])
    about = "Watch runs from their directories. `dashboard --help` explains workspaces in W&B."
    parser = Parser(called="caduceus-monitor", start=_START, description=about)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directory")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write an HTML page with curves and differences")
    arguments = parser.parse_args()
    if arguments.report is not None:
        write_report(arguments.runs, arguments.report)
        print(arguments.report)
        return 0
    followed = [Followed(path) for path in arguments.runs]
    console = Console(highlight=False)
    for run in followed:
        run.poll()
    if not console.is_terminal:
        for run in followed:
            print(f"{run.view.name}: {plain_line(run.view) if run.view.row else 'no steps yet'}")
        return 0
    if 5 * len(followed) > console.height:
        raise UserError(f"{len(followed)} runs do not fit a terminal of {console.height} lines; watch fewer at a time")
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            for run in followed:
                run.poll()
            live.update(panel([run.view for run in followed], console.width), refresh=True)
            time.sleep(_POLL_SECONDS)
    return 0


def command() -> None:
    """The command line."""
    run_command(main)


if __name__ == "__main__":
    command()
