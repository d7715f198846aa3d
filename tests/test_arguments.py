"""A mistake on any command line is one line and exit status 2."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from caduceus.commands import COMMANDS
from caduceus.config import SECTIONS, load_config
from caduceus.errors import UserError
from caduceus.evaluate.commands import verb_arguments
from caduceus.presets import presets
from launch import runs
from tests import preloaded
from tests.conftest import REPOSITORY

WHOLE, NUMBER = "must be a whole number, got 'many'; see --help", "must be a number, got 'nan'; see --help"


@pytest.mark.moderate
@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("data_prep/shard_genome.py --fasta a.fa --species a --out o --window many", f"--window: {WHOLE}"),
        ("data_prep/shard_genome.py --fasta a.fa --species a --out o --min-acgt nan", f"--min-acgt: {NUMBER}"),
        ("launch/shard.py --genomes a.yaml --out o --cpus-per-task many", f"--cpus-per-task: {WHOLE}"),
        ("launch/slurm.py --nodes many", f"--nodes: {WHOLE}"),
        ("launch/runs.py logs run --rank many", f"--rank: {WHOLE}"),
        ("launch/runs.py stop run --now", "unrecognized arguments: --now; see --help"),
        ("launch/runs.py begin", "action: invalid choice: 'begin'"),
        ("-m caduceus.train data.seq_len=1024", "the following arguments are required: --config; see --help"),
    ],
)
def test_a_mistake_is_told_in_a_line(command: str, message: str) -> None:
    done = call(command)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith(f"error: {message}")


def call(command: str, folder: Path = REPOSITORY) -> subprocess.CompletedProcess:
    return preloaded.run([sys.executable, *command.split()], cwd=folder, capture_output=True, text=True)


@pytest.mark.moderate
@pytest.mark.parametrize("form", COMMANDS.values())
def test_a_command_called_with_nothing_says_what_comes_next(form: str) -> None:
    words = form.removeprefix("python ").split()  # each command is started afresh once, here
    done = subprocess.run([sys.executable, *words], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "")
    assert re.match(r"[A-Z][a-z-]+s ", done.stdout), "it says what it does"
    advised = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ")]
    assert advised and all(line.startswith(tuple(COMMANDS.values())) for line in advised), "how it is called here"


@pytest.mark.moderate
def test_a_command_ends_quietly_when_nobody_reads_on() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "caduceus.train", "--config", "list"]
    done = preloaded.run(command, cwd=REPOSITORY, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, ""), "as a process that SIGPIPE ended"


@pytest.mark.moderate
def test_what_trains_lists_presets_and_sections(tmp_path: Path) -> None:
    listed = call("-m caduceus.train --config list", tmp_path)
    assert (listed.returncode, listed.stderr) == (0, "")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == list(presets("pretrain"))
    of_ps = [name for name in presets("pretrain") if name.startswith("ps-")]
    assert of_ps == ["ps-1k", "ps-1k-118", "ps-32k", "ps-131k", "ps-1m", "ps-stages"]
    assert all(len(line.split()) > 3 for line in listed.stdout.splitlines()), "each says what it is"
    told = call("-m caduceus.train --help", tmp_path).stdout
    assert all(f"\n  {name}. " in told for name in SECTIONS)
    assert all(f"\n  {name} " in told for name in presets("pretrain"))


@pytest.mark.moderate
def test_both_ways_to_train_list_the_same_presets() -> None:
    assert call("launch/slurm.py --config list").stdout == call("-m caduceus.train --config list").stdout


@pytest.mark.moderate
def test_a_preset_is_shown_from_any_folder_and_loads_as_shown(tmp_path: Path) -> None:
    done = call("-m caduceus.train --config ps-131k --show data.path=there train.betas=[0.8,0.9]", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "  # Bases per training sequence. At least 1.\n  seq_len: 131072\n" in done.stdout
    (tmp_path / "shown.yaml").write_text(done.stdout)
    asked = ["data.path=there", "train.betas=[0.8,0.9]"]
    assert load_config(tmp_path / "shown.yaml") == load_config("ps-131k", asked)
    assert [path.name for path in tmp_path.iterdir()] == ["shown.yaml"]


def test_the_help_of_a_subcommand_begins_with_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        verb_arguments(["suite", "--help"])
    assert "\nA benchmark of many tasks" in capsys.readouterr().out


def test_what_may_be_left_out_is_not_named_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["runs.py", "resume"])
    with pytest.raises(UserError, match=r"^the following arguments are required: RUN; see --help$"):
        runs.parse_arguments()
