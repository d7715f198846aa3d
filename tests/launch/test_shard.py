"""Sharding species by species and merging equals sharding them together."""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from caduceus.errors import UserError
from data_prep.source.species_file import read_species_file
from launch import shard
from launch.shard_tasks import MergeTask, SpeciesTask, divided, parts_folder
from tests import preloaded
from tests.conftest import REPOSITORY, write_random_fasta


def write_species(folder: Path) -> Path:
    """Two species in a file, with weights that depend on their sizes."""
    write_random_fasta(folder / "a.fa", 1, {"chr1": 9000, "chr2": 5000})
    write_random_fasta(folder / "b.fa", 2, {"chrA": 7000})
    path = folder / "species.yaml"
    path.write_text(
        "weights: bases^0.5\ndefaults: {window: 2048}\nspecies:\n"
        "- {name: first, fasta: a.fa, valid_contigs: [chr2]}\n- {name: second, fasta: b.fa, weight: 2}\n"
    )
    return path


def contents(dataset: Path) -> dict[str, bytes]:
    """All files of a dataset."""
    files = [path for path in dataset.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(dataset)): path.read_bytes()
        for path in files
        if not path.relative_to(dataset).parts[0].startswith(".")
    }


def times(dataset: Path) -> dict[str, int]:
    """When each file of a dataset was written."""
    return {name: (dataset / name).stat().st_mtime_ns for name in contents(dataset)}


def shard_together(species: Path, out: Path) -> None:
    command = [sys.executable, str(REPOSITORY / "data_prep" / "shard_genome.py"), "--genomes", str(species)]
    preloaded.run([*command, "--workers", "1", "--out", str(out)], check=True, capture_output=True)


def shard_apart(species: Path, out: Path, *request: str) -> str:
    command = [sys.executable, str(REPOSITORY / "launch" / "shard.py"), "--genomes", str(species), "--out", str(out)]
    done = preloaded.run([*command, *request], env=dict(os.environ), capture_output=True, text=True, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("species", "request_", "message"),
    [
        ("{name: dog, fasta: dog.fa}", [], r"dog: .*/dog\.fa: no such file"),
        ("{name: dog, fasta: a.fa, intervals: dog.bed}", [], r"dog: .*dog\.bed: no such file"),
        ("{name: dog, fasta: a.fa}", ["--chain", "3"], "chain: is for training runs"),
        ("{name: dog, fasta: a.fa}", ["--task-bases", "0"], "--task-bases: must be at least 1, got 0"),
        ("{name: dog, fasta: a.fa, valid_contigs: [chr1], homology: 0.5}", [], "dog: homology: compares all species"),
    ],
)
def test_what_jobs_would_fail_for_is_refused_before(fake_slurm, monkeypatch, tmp_path, species, request_, message):
    write_random_fasta(tmp_path / "a.fa", 1, {"chr1": 3000})
    path = tmp_path / "species.yaml"
    path.write_text(f"species:\n- {species}\n")
    command = ["shard.py", "--genomes", str(path), "--out", str(tmp_path / "out"), *request_]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(UserError, match=message):
        shard.main()
    assert not fake_slurm.asked("sbatch") and not (tmp_path / "out").exists()


@pytest.mark.moderate
def test_species_that_jobs_are_at_are_not_submitted_again_and_others_are(fake_slurm, monkeypatch, tmp_path, capsys):
    species, out = write_species(tmp_path), tmp_path / "out"
    command = ["shard.py", "--genomes", str(species), "--out", str(out), "--cluster", "cpu"]
    command += ["--task-bases", "15000"]
    monkeypatch.setattr(sys, "argv", command)
    submits = f'case "$*" in *--test-only*) exit 0;; esac; echo x >> {tmp_path}/n'
    fake_slurm.answer("sbatch", f"{submits}; set -- $(/usr/bin/wc -l {tmp_path}/n); echo Submitted batch job $1")
    assert shard.main() == 0
    assert "2 for 2 species, jobs 1_0 … 1_1; merged by job 2" in capsys.readouterr().out
    for live, job in (("1|1_1|RUNNING|None", "1_1"), ("2|2_N/A|PENDING|Dependency", "2")):
        fake_slurm.answer("squeue", f"echo '{live}'")
        with pytest.raises(UserError, match=f"out is being written by job {job}; wait for it, or: scancel {job[0]}"):
            shard.main()
    assert len(fake_slurm.asked("sbatch")) == 2
    write_random_fasta(tmp_path / "c.fa", 3, {"chr1": 4000})
    species.write_text("species:\n- {name: third, fasta: c.fa}\n")
    assert shard.main() == 0
    species = write_species(tmp_path)
    fake_slurm.answer("squeue", "exit 0")
    assert shard.main() == 0
    assert len(fake_slurm.asked("sbatch")) == 6


def test_shares_wait_for_their_plans_and_the_merge_for_all(fake_slurm, monkeypatch, tmp_path, capsys):
    species, out = write_species(tmp_path), tmp_path / "out"
    write_random_fasta(tmp_path / "c.fa", 3, {"chr1": 30_000})
    species.write_text(species.read_text() + "- {name: third, fasta: c.fa}\n")
    command = ["shard.py", "--genomes", str(species), "--out", str(out), "--cluster", "cpu", "--task-bases", "10k"]
    monkeypatch.setattr(sys, "argv", command)
    submits = 'case "$*" in *--test-only*) exit 0;; esac; '
    submits += f"/bin/cp $1 {tmp_path}/sent-$(/usr/bin/wc -l < {tmp_path}/n).sh; echo x >> {tmp_path}/n"
    (tmp_path / "n").touch()
    fake_slurm.answer("sbatch", f"{submits}; set -- $(/usr/bin/wc -l {tmp_path}/n); echo Submitted batch job $1")
    assert shard.main() == 0
    # Tasks 0 and 1 of the first array plan first (2 shares) and third (4), task 2 makes second.
    assert "tasks:         9 for 3 species, jobs 1_0 … 2_5; merged by job 3" in capsys.readouterr().out
    sent = [path.read_text().splitlines() for path in sorted(tmp_path.glob("sent-*.sh"))]
    waits = [[line.split("=")[1] for line in lines if "--dependency" in line] for lines in sent]
    assert waits == [[], ["afterok:1_0:1_1"], ["afterok:1:2"]]


@pytest.mark.slow
def test_small_species_share_a_task_and_a_large_one_is_shared_out(tmp_path):
    folder, out, together = tmp_path / "genomes", tmp_path / "apart", tmp_path / "together"
    folder.mkdir()
    lines = ["weights: bases^0.5\ndefaults: {window: 2048, shard_bytes: 65536}\nspecies:\n"]
    for number in range(30):
        write_random_fasta(folder / f"{number}.fa", number, {"chr1": 3000 + 50 * number, "chr2": 2500})
        lines.append(f"- {{name: small{number:02d}, fasta: {number}.fa, valid_contigs: [chr2]}}\n")
    write_random_fasta(folder / "large.fa", 99, {"chr1": 200_000, "chr2": 150_000})
    lines.insert(7, "- {name: large, fasta: large.fa, valid_contigs: [chr2]}\n")
    (folder / "species.yaml").write_text("".join(lines))
    shard_together(folder / "species.yaml", together)

    requests = read_species_file(folder / "species.yaml", {}, None)
    first, then = divided(requests, out, 1, 100_000)
    assert [len(task.requests) for task in first if isinstance(task, SpeciesTask)] == [16, 14]
    assert [task.shares for task in then] == [4] * 4
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, spawn) as pool:
        list(pool.map(_do, first))
        list(pool.map(_do, then[:2]))
    large = parts_folder(out) / "large"
    written = sorted(path.name for path in large.glob("*.tar"))
    assert 4 <= len(written) < len(list((together / "large").glob("*.tar"))) and not list(out.glob("manifest.json"))

    # What was stopped goes on, in another number of tasks, with what is there; a shard that was lost is made again.
    (large / written[0]).unlink()
    kept = {name: (large / name).stat().st_mtime_ns for name in written[1:]}
    small = times(parts_folder(out))
    first, then = divided(requests, out, 1, 150_000)
    with ProcessPoolExecutor(2, spawn) as pool:
        list(pool.map(_do, first))
        list(pool.map(_do, then))
    assert {name: (large / name).stat().st_mtime_ns for name in kept} == kept
    assert {name: time for name, time in times(parts_folder(out)).items() if name in small and "large" not in name} == {
        name: time for name, time in small.items() if "large" not in name
    }
    every = sorted(path.name for path in (together / "large").glob("*.tar"))
    assert sorted(path.name for path in large.glob("*.tar")) == every, "none is left to the one that merges"
    MergeTask(tuple(requests), out, tuple(requests))()
    assert contents(out) == contents(together)
    assert [path.name for path in (out / "large").glob(".*")] == [] and not parts_folder(out).exists()


def _do(task):
    task()


@pytest.mark.slow
def test_on_this_machine_and_again(tmp_path):
    species = write_species(tmp_path)
    together, apart = tmp_path / "together" / "data", tmp_path / "apart" / "data"
    apart.parent.mkdir()
    shard_together(species, together)
    assert "already" not in shard_apart(species, apart, "--cluster", "local")
    assert contents(apart) == contents(together)
    assert not (apart / ".jobs" / "parts").exists()
    made = times(apart)
    assert "data: holds 2 of 2 species already\n" in shard_apart(species, apart, "--cluster", "local")
    assert times(apart) == made


@pytest.mark.slow
def test_what_the_dataset_holds_is_not_submitted_again(fake_slurm, monkeypatch, tmp_path, capsys):
    species, out = write_species(tmp_path), tmp_path / "out"
    shard_together(species, out)
    made = times(out)
    monkeypatch.setattr(sys, "argv", ["shard.py", "--genomes", str(species), "--out", str(out), "--cluster", "cpu"])
    assert shard.main() == 0
    assert "out: holds 2 of 2 species already\n" in capsys.readouterr().out
    assert not fake_slurm.asked("sbatch") and times(out) == made

    whole, text = contents(out), species.read_text()
    species.write_text(text.replace("window: 2048", "window: 1024"))
    with pytest.raises(UserError, match=r"out/first: holds window 2048, but now it is 1024 .*choose another --out"):
        shard.main()
    species.write_text(text.replace("bases^0.5", "bases"))  # decides none of the shards
    assert shard.main() == 0
    weighted = tmp_path / "weighted"
    shard_together(species, weighted)
    assert contents(out) == contents(weighted) != whole
    assert not fake_slurm.asked("sbatch")

    write_random_fasta(tmp_path / "c.fa", 3, {"chr1": 4000})
    next((out / "second").glob("*.tar")).unlink()
    species.write_text(species.read_text() + "- {name: third, fasta: c.fa}\n")
    assert shard.main() == 0
    assert "out: holds 1 of 3 species already\ntasks:         1 for 2 species, " in capsys.readouterr().out


@pytest.mark.slow
def test_a_species_is_added_to_those_that_are_there(tmp_path):
    species = write_species(tmp_path)
    together, apart = tmp_path / "together", tmp_path / "apart"
    shard_together(species, apart)
    write_random_fasta(tmp_path / "c.fa", 3, {"chr1": 4000})
    species.write_text(species.read_text() + "- {name: third, fasta: c.fa}\n")
    shard_together(species, together)
    assert "third (1 of 1)\n" in shard_apart(species, apart, "--cluster", "local")
    assert contents(apart) == contents(together)
