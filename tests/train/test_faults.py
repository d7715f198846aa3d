"""What clusters do to a run, done to real processes: two ranks, joined by gloo, train one small model."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from caduceus.config import Config, save_config
from caduceus.run.directory import RunDirectory
from caduceus.train.stopping import EXIT_REQUEUE
from tests import preloaded
from tests.distributed.ranks import start_ranks
from tests.train.conftest import SmallRun, numbers
from tests.train.test_checkpointing import small_disk

pytestmark = pytest.mark.slow

RUN = Path(__file__).parent / "faulty_run.py"
RANKS, STEPS = 2, 10


def small_config(runs: SmallRun, name: str, **sections: dict[str, Any]) -> Config:
    sections = {
        "model": {"d_model": 8, "n_layer": 1, "d_state": 2, "rcps": True},
        "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 1, **sections.pop("train", {})},
        "data": {"path": str(runs.shards), "seq_len": 64, "workers": 0},
        "valid": {"every": 0},
        "checkpoint": {"every": 4, "keep": 0},
        **sections,
    }
    return runs.config(name, **sections)


class Job:
    """The processes of a run, and what they said."""

    def __init__(self, config: Config, *fault: object) -> None:
        path = Path(config.run.dir).parent / f"{config.run.name}.yaml"
        save_config(config, path)
        command = [sys.executable, RUN, path, *map(str, fault)]
        self.processes = start_ranks([command] * RANKS, stderr=subprocess.PIPE)

    def wait(self, seconds: float = 300) -> tuple[list[int], list[str]]:
        """Exit statuses and messages of the ranks; fails the test where one does not end in time."""
        end = time.monotonic() + seconds
        try:
            messages = [process.communicate(timeout=max(end - time.monotonic(), 0.1))[1] for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [process.returncode for process in self.processes], messages

    def finish(self) -> None:
        statuses, messages = self.wait()
        assert statuses == [0] * RANKS, "\n".join(messages)


@pytest.fixture(scope="module")
def runs(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return SmallRun(small_shards, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def undisturbed(runs: SmallRun) -> list[dict[str, Any]]:
    config = small_config(runs, "undisturbed")
    Job(config).finish()
    return numbers(config.run.dir)


def test_one_rank_killed_in_a_step_ends_the_other_and_a_restart_makes_the_same_run(runs: SmallRun, undisturbed) -> None:
    config = small_config(runs, "killed")
    statuses, _ = Job(config, "die", 1, 7).wait()
    assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, EXIT_REQUEUE)
    assert len(numbers(config.run.dir)) == 5  # the row of step 6 would have come with what ranks exchange in step 7
    Job(config).finish()
    assert numbers(config.run.dir) == undisturbed


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(runs: SmallRun, undisturbed) -> None:
    config = small_config(runs, "signalled")
    run = RunDirectory(config.run.dir)
    job = Job(config)
    while not run.metrics():
        time.sleep(0.01)
        assert all(process.poll() is None for process in job.processes), job.wait()
    job.processes[1].send_signal(signal.SIGTERM)
    statuses, messages = job.wait()
    assert statuses == [EXIT_REQUEUE] * RANKS, messages
    rows = numbers(run.path)
    assert run.checkpoints()[-1].step == len(rows) < STEPS
    Job(config).finish()
    assert numbers(run.path) == undisturbed


@pytest.mark.parametrize("what", ["nan_loss", "nan_gradient"])
def test_nan_on_one_rank_skips_the_step_on_all_and_names_its_samples(runs: SmallRun, undisturbed, what: str) -> None:
    config = small_config(runs, what)
    Job(config, what, 1, 6).finish()
    rows = numbers(config.run.dir)
    assert rows[:5] == undisturbed[:5]
    assert (rows[5]["loss"] is None) == (what == "nan_loss") and rows[5]["grad_norm"] is None
    assert [row["skipped_steps"] for row in rows] == [0] * 5 + [1] * 5
    assert [row["samples"] for row in rows] == [row["samples"] for row in undisturbed]
    assert all(row["loss"] < 3 for row in rows[6:])
    reported = {}
    for path in (Path(config.run.dir) / "logs").glob("skipped-rank*.jsonl"):
        (row,) = [json.loads(line) for line in path.read_text().splitlines()]
        assert row["step"] == 6
        reported[row["rank"]] = row["samples"]
    # Step 6 holds samples 20 to 23, of which rank 1 has every other one, one in a micro-batch.
    named = {rank: [sample["g"] for sample in samples] for rank, samples in reported.items()}
    assert named == ({1: [21]} if what == "nan_loss" else {0: [20, 22], 1: [21, 23]})
    assert reported[1][0].keys() == {"g", "species", "contig", "start", "end", "strand"}


def test_a_rank_that_hangs_is_found_and_every_rank_tells_where_it_was(runs: SmallRun, undisturbed) -> None:
    config = small_config(runs, "hung", train={"stall_minutes": 0.15})
    statuses, messages = Job(config, "hang", 1, 3).wait()
    assert 0 not in statuses and EXIT_REQUEUE not in statuses
    assert "rank 1: step 3 has taken more than train.stall_minutes=0.15" in messages[1]
    stacks = [(Path(config.run.dir) / "logs" / f"stacks-rank{rank}.txt").read_text() for rank in range(RANKS)]
    assert re.search(r"faulty_run\.py.* in hang", stacks[1])
    assert re.search(r"ranks\.py.* in sum", stacks[0])  # of label weights, which begins a step


def test_a_full_disk_ends_the_run_in_a_line_and_keeps_earlier_checkpoints(runs: SmallRun, undisturbed) -> None:
    with small_disk(runs.directory / "disk") as disk:
        config = small_config(runs, "full", run={"dir": str(disk / "run"), "name": "full", "device": "cpu"})
        statuses, messages = Job(config, "fill_disk", 0, 7).wait()
        assert statuses == [2] * RANKS, messages
        (line,) = [line for line in messages[0].splitlines() if line.startswith("error:")]
        assert "step 8 could not be written ([Errno 28] No space left on device)" in line and "make room" in line
        assert [checkpoint.step for checkpoint in RunDirectory(config.run.dir).checkpoints()] == [4]
        (disk / "ballast").unlink()
        Job(config).finish()
        assert numbers(config.run.dir) == undisturbed


@pytest.mark.parametrize(("ranks", "kills"), [(1, 12), (2, 6)])
def test_killed_at_many_instants_of_saving_the_newest_checkpoint_is_whole(
    tmp_path: Path, ranks: int, kills: int
) -> None:
    command = [sys.executable, "-m", "tests.train.checkpoint_killer", str(tmp_path / "run"), str(kills), str(ranks)]
    result = preloaded.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    *newest, summary = result.stdout.splitlines()
    assert len(newest) == kills
    assert int(summary.split()[0]) >= kills / 2, summary
