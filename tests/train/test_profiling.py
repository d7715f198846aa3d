"""A profile of a few steps: made once, of the steps asked for, and without a trace in the run's numbers."""

import gzip
import json
import logging
from pathlib import Path

import pytest
import torch

from caduceus.config import load_config
from caduceus.config.run import profiled_steps
from caduceus.distributed.ranks import Ranks
from caduceus.errors import UserError
from caduceus.run.directory import RunDirectory
from caduceus.train.profiling import Profile
from caduceus.train.trainer import train
from tests.train.conftest import SmallRun, numbers


@pytest.mark.moderate
def test_steps_are_profiled_and_the_run_is_the_same(small_run: SmallRun, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    sections = {"train": {"steps": 5}, "valid": {"every": 0}, "checkpoint": {"every": 9}}
    plain, profiled = (
        small_run.config(name, **sections, monitor={"profile": asked}) for name, asked in (("a", None), ("b", "3:4"))
    )
    assert train(plain) == train(profiled) == 0
    assert numbers(plain.run.dir) == numbers(profiled.run.dir)
    assert not (Path(plain.run.dir) / "profile").exists()
    (trace,) = (Path(profiled.run.dir) / "profile").iterdir()
    assert trace.name == "steps-3-4-rank0.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(str(event.get("name", "")).startswith("Optimizer.step") for event in events) >= 2
    (told,) = [message for message in caplog.messages if message.startswith("profile of the steps 3 to 4")]
    head, *rows = told.splitlines()[1:]
    assert str(trace) in told and len(rows) == 20
    assert max(map(len, [head, *rows])) <= 80  # a terminal does not wrap it
    shares = [float(row[38:].split()[0].rstrip("%")) for row in rows]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0 and 50 < sum(shares) < 101


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_a_gpu_a_snapshot_of_its_memory_lies_beside_the_trace(
    small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The GPU, which may be absent here, is made up; what torch does without one is the same."""
    caplog.set_level(logging.INFO)
    recorded: list[dict[str, object]] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: recorded.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: Path(path).write_bytes(b"what held memory"))
    ranks = Ranks(0, 1, 1, torch.device("cpu"))
    ranks.device = torch.device("cuda")
    profile = Profile(small_run.config("run", monitor={"profile": "2:3"}), tmp_path, ranks)
    for step in range(1, 5):
        with profile.of(step):
            torch.ones(64).cumsum(0)
    kept = {path.name: path for path in (tmp_path / "profile").iterdir()}
    assert set(kept) == {"steps-2-3-rank0.json.gz", "steps-2-3-rank0-memory.pickle"}
    assert kept["steps-2-3-rank0-memory.pickle"].read_bytes() == b"what held memory"
    assert [set(options) for options in recorded] == [{"max_entries"}, {"enabled"}] and recorded[1]["enabled"] is None
    (told,) = [message for message in caplog.messages if message.startswith("profile of the steps 2 to 3")]
    assert "-memory.pickle" in told and "aten::cumsum" in told


@pytest.mark.moderate
def test_a_profile_that_cannot_be_kept_is_one_warning(small_run: SmallRun, caplog: pytest.LogCaptureFixture) -> None:
    config = small_run.config("run", train={"steps": 2}, valid={"every": 0}, monitor={"profile": "1:1"})
    RunDirectory.create_or_resume(config).release()
    (Path(config.run.dir) / "profile").write_text("in the way")
    assert train(config) == 0
    config.train.steps, config.run.allow_change = 3, ["train.steps"]
    assert train(config) == 0
    warnings = [record.message for record in caplog.records if record.message.startswith("monitor.profile")]
    assert len(warnings) == 2 and "no profile was made" in warnings[0] and "give steps after 2" in warnings[1]


@pytest.mark.moderate
def test_mistakes_are_told(small_run: SmallRun) -> None:
    assert profiled_steps("10:13") == (10, 13) and profiled_steps("100:110") == (100, 110)
    assert profiled_steps(load_config("demo", ["monitor.profile=10:13"]).monitor.profile) == (10, 13)
    for wrong in ("13:10", "0:3", "a:b", "7"):
        with pytest.raises(UserError, match=r"monitor.profile: give the first and the last step"):
            small_run.config("run", monitor={"profile": wrong})
    with pytest.raises(UserError, match=r"monitor.profile_ranks: there is no rank 1 among 1"):
        train(small_run.config("run", monitor={"profile": "1:1", "profile_ranks": [1]}))
