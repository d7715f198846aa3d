"""No process dies of what passes on a file system of a network, and nothing half-read is taken for whole."""

import json
import shutil
from pathlib import Path

import pytest

from caduceus.run.directory import RunDirectory
from tests.conftest import write_random_fasta
from tests.launch.test_shard import contents, shard_together
from tests.odd_files import compiled, run_behind

FAULTS = ("open-ESTALE", "stat-ESTALE", "read-EIO")


@pytest.mark.slow
def test_shards_of_two_nodes_are_those_of_one_process(tmp_path: Path) -> None:
    library, folder = compiled(tmp_path), tmp_path / "shared"
    folder.mkdir()
    lines = ["defaults: {window: 2048, shard_bytes: 65536, valid_contigs: [chr2]}\nspecies:\n"]
    for number, length in enumerate((4000, 5000, 6000, 150_000)):
        write_random_fasta(folder / f"{number}.fa", number, {"chr1": length, "chr2": 2500})
        lines.append(f"- {{name: species{number}, fasta: {number}.fa}}\n")
    species = folder / "species.yaml"
    species.write_text("".join(lines))
    shard_together(species, tmp_path / "together")
    for path in folder.glob("*.fai"):
        path.unlink()
    met = run_behind(library, folder, "tests.odd_work", "shard", species, folder / "out", late=200, faults=12)
    assert all(met[fault] for fault in FAULTS) and met["late"] + met["unlisted"] > 0
    assert contents(folder / "out") == contents(tmp_path / "together")


@pytest.mark.slow
def test_ranks_of_two_nodes_train_save_and_resume(small_shards: Path, tmp_path: Path) -> None:
    library, folder = compiled(tmp_path), tmp_path / "shared"
    folder.mkdir()
    shards, run = folder / "shards", folder / "runs" / "one"
    shutil.copytree(small_shards, shards)
    met = run_behind(library, folder, "tests.odd_work", "train", shards, run, late=900, faults=20)
    assert all(met[fault] for fault in FAULTS) and met["late"] + met["unlisted"] > 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    newest = RunDirectory(run).newest_valid_checkpoint()
    assert newest is not None and newest.step == 4
    assert not [*(run / "checkpoints").glob("damaged-*")]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "start"] == [0, 2]
    assert not [event for event in events if "substitut" in str(event)]
    assert "complete" in (run.parent / "listed.txt").read_text() and "4/4" in (run.parent / "listed.txt").read_text()
