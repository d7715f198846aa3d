"""The torchrun that started this process as a rank, and whether it is still there.

Ranks run in sessions of their own: a signal that kills torchrun with its terminal or process group does not reach them.
"""

import os

AGENT = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
"""Process id of the torchrun that started this rank; None for a process that was started otherwise."""


def agent_is_gone() -> bool:
    """Whether the torchrun that started this rank has ended, so that no process waits for this one any more."""
    return AGENT is not None and os.getppid() != AGENT
