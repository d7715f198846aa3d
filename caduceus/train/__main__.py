"""python -m caduceus.train --config configs/pretrain/NAME.yaml [key.path=value …]"""

import logging
import signal
import warnings

from caduceus.arguments import Parser
from caduceus.config import load_config
from caduceus.errors import run_command


def main() -> int:
    """Parse the command line and train; returns the exit status."""
    parser = Parser(prog="python -m caduceus.train", description="Pre-train Caduceus.")
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="configuration, such as configs/pretrain/*.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings that win over the file's")
    arguments = parser.parse_args()
    set_up_logging()
    config = load_config(arguments.config, arguments.overrides)
    from caduceus.train.trainer import train

    status = train(config)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run has ended, and its status tells how
    return status


def set_up_logging() -> None:
    """Messages of the run as plain lines on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")


if __name__ == "__main__":
    run_command(
        main, interrupted="interrupted before a checkpoint was made; the same command goes on from the newest one"
    )
