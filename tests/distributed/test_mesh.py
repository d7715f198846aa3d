from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from caduceus.distributed.mesh import COLLECTIVE_MARGIN, FOR_EVER, joined
from tests.distributed.layouts import Layout, config_of


@pytest.mark.parametrize(
    ("minutes", "timeout"), [(2, timedelta(minutes=2) + COLLECTIVE_MARGIN), (0, FOR_EVER), (1e300, FOR_EVER)]
)
def test_a_collective_may_take_longer_than_a_step(tmp_path: Path, minutes: float, timeout: timedelta) -> None:
    config = config_of(Layout("", 1, {"strategy": "ddp"}), tmp_path, tmp_path / "run", stall_minutes=minutes)
    with joined(config):
        group = dist.group.WORLD._get_backend(torch.device("cpu"))
        assert group.options._timeout == timeout
