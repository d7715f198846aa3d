"""What W&B is told of besides steps."""

from pathlib import Path

import pytest

from caduceus.monitor.wandb.happenings import Happenings
from caduceus.run.events import record_event


@pytest.mark.parametrize(
    ("kind", "facts", "expected"),
    [
        ("skipped", {"loss": "nan", "grad_norm": "1.0"}, ("A step was skipped", "loss nan, grad norm 1.0", "WARN")),
        ("rewind", {"after": 9}, ("The loss jumped, and the run went back", "from step 9", "WARN")),
        ("stalled", {"reason": "rank 1 waits"}, ("The run has stalled", "rank 1 waits", "ERROR")),
        ("failed", {"reason": "gave up"}, ("The run has failed", "gave up", "ERROR")),
        ("checkpoint", {"seconds": 1.5}, None),
        ("start", {"number": 2}, None),
    ],
)
def test_what_is_worth_an_alert_has_one_once(
    tmp_path: Path, kind: str, facts: dict[str, object], expected: tuple[str, str, str] | None
) -> None:
    record_event(tmp_path, kind, 3, **facts)
    for since, told in ((0.0, [expected] if expected else []), (1e12, [])):  # before this start: the one before told it
        alerts: list[tuple[str, str, str]] = []
        happenings = Happenings(tmp_path, last=0, since=since)
        for _ in range(2):
            happenings.poll(lambda *alert, to=alerts: to.append(alert))
        assert alerts == [(title, f"step 3: {text}", level) for title, text, level in told]
        happenings.poll(None)


def test_a_row_tells_once_of_what_came_before_it(tmp_path: Path) -> None:
    for kind, step, facts in (
        ("start", 4, {"number": 2, "requeues": 1}),
        ("checkpoint", 4, {"seconds": 9.0}),  # W&B has the row of step 4 already
        ("checkpoint", 6, {"seconds": 1.5}),
        ("rewind", 6, {"after": 8}),
    ):
        record_event(tmp_path, kind, step, **facts)
    happenings = Happenings(tmp_path, last=4, since=0.0)
    happenings.poll(None)
    assert happenings.markers(5) == {"events/start": 2, "events/requeues": 1}
    assert happenings.markers(7) == {"events/checkpoint_seconds": 1.5, "events/rewind_from": 8}
    assert happenings.markers(8) == {}
