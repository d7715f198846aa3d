"""What the client's files of an offline run hold, read back by its own protobuf."""

import os
import signal
import time
from pathlib import Path

import pytest

from caduceus.monitor.wandb.identity import identity
from caduceus.monitor.wandb.offline import drop_steps_after, last_step, read_records, run_files, step_of, write_records
from caduceus.run.directory import RunDirectory
from tests.monitor.conftest import STEPS, Watched, children_of, history_of, write_rows

wandb_pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")


def history_record(step: int, size: int = 10) -> "wandb_pb.Record":
    record = wandb_pb.Record()
    for key, value in (("_step", str(step)), ("train/loss", "1.5"), ("text", '"' + "x" * size + '"')):
        item = record.history.item.add()
        item.nested_key.append(key)
        item.value_json = value
    return record


@pytest.mark.parametrize("size", [10, 9000, 32768 - 200, 100_000])
def test_records_of_any_size_come_back(tmp_path: Path, size: int) -> None:
    records = [history_record(step, size) for step in range(1, 9)]
    write_records(tmp_path / "run.wandb", records)
    assert list(read_records(tmp_path / "run.wandb")) == records


def test_a_file_cut_by_a_kill_is_read_up_to_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "run.wandb"
    write_records(path, [history_record(step, 20_000) for step in range(1, 9)])
    path.write_bytes(path.read_bytes()[:-7000])
    assert [step_of(record) for record in read_records(path)] == list(range(1, 8))
    path.write_bytes(b"")
    assert list(read_records(path)) == []


def test_undone_steps_are_dropped_and_other_records_stay(tmp_path: Path) -> None:
    folder = tmp_path / "offline-run-20260101_000000-abc"
    folder.mkdir()
    other = wandb_pb.Record()
    other.output_raw.line = "a line of the console"
    write_records(folder / "run-abc.wandb", [history_record(1), other, history_record(2), history_record(3)])
    drop_steps_after(tmp_path, "abc", 2)
    assert last_step(tmp_path, "abc") == 2
    kept = list(read_records(folder / "run-abc.wandb"))
    assert [step_of(record) for record in kept] == [1, 0, 2] and kept[1] == other


@pytest.mark.slow
def test_three_kills_leave_one_run_with_the_values_of_metrics(tmp_path: Path) -> None:
    path = tmp_path / "run"
    kills = ((1, 12, False), (11, 22, True), (6, 25, False))  # the third start is from an older checkpoint
    for first, last, with_sender in kills:
        process = write_rows(path, first)
        while newest(path) < last:
            time.sleep(0.1)
            assert process.poll() is None
        if with_sender:
            (sender,) = children_of(process.pid)
            os.kill(sender, signal.SIGKILL)
        process.kill()
        process.wait()
    watched = Watched(path, mode="offline")
    watched.go_on(21, STEPS)
    (run_id,) = {folder.name.rsplit("-", 1)[1] for folder in (path / "wandb").glob("offline-run-*")}
    assert run_id == identity(path).id
    found = [row for file in run_files(path / "wandb", run_id) for row in history_of(file)]
    assert sorted(found, key=lambda row: row["step"]) == watched.rows()


def newest(path: Path) -> int:
    rows = RunDirectory(path).metrics()
    return rows[-1]["step"] if rows else 0
