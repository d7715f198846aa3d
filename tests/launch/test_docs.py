"""docs/clusters.md: its commands are taken as they are, and its tables name what exists."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest

from launch import runs, shard
from launch.request import PRESETS, JobRequest
from launch.submission import REPOSITORY
from tests.slurm import cluster

PAGE = (REPOSITORY / "docs" / "clusters.md").read_text()
COMMANDS = [
    line.removeprefix("$ ").split(" #")[0]
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("$ ")
]


def of(script: str) -> list[list[str]]:
    """The arguments of each command of the page that runs a script."""
    return [shlex.split(command)[2:] for command in COMMANDS if command.startswith(f"python {script}")]


SUBMISSIONS = [arguments for arguments in of("launch/slurm.py") if "--check" not in arguments]
"""A check runs on the cluster, which tests/slurm does."""


@pytest.mark.parametrize("arguments", SUBMISSIONS, ids=" ".join)
def test_each_submission_of_the_page_is_one_that_can_be_made(launch, monkeypatch, capsys, arguments):
    monkeypatch.chdir(REPOSITORY)
    assert launch("--dry-run", *arguments) == 0
    assert "#SBATCH --nodes=" in capsys.readouterr().out


def test_each_command_that_looks_after_runs_is_one_of_launch_runs(monkeypatch):
    actions = set()
    for arguments in of("launch/runs.py"):
        monkeypatch.setattr("sys.argv", ["runs.py", *arguments])
        actions.add(runs.parse_arguments().action)
    assert actions == {"list", "status", "logs", "stop", "cancel", "resume"}


def test_the_other_commands(monkeypatch):
    (arguments,) = of("launch/shard.py")
    monkeypatch.setattr("sys.argv", ["shard.py", *arguments])
    assert (REPOSITORY / shard.parse_arguments().genomes).is_file()
    assert [arguments[:1] for arguments in of("tests/slurm/cluster.py")] == [["start"], ["stop"]]
    assert any("tests/slurm/cluster.py env" in command for command in COMMANDS) and Path(cluster.__file__).is_file()
    known = ("python launch/", "python tests/slurm/cluster.py ", "eval ", "make demo", "scontrol requeue ")
    known += ("python -m caduceus.doctor ",)
    assert all(command.startswith(known) for command in COMMANDS)


def test_the_table_of_keys_and_the_presets_are_those_that_there_are():
    table = PAGE.split("| key | what it says |")[1].split("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert sorted(re.findall(r"`(\w+)`", "".join(rows))) == sorted(field.name for field in fields(JobRequest))
    named = set(re.findall(r"`(\w+)`", re.search(r"has some\s*\((.*?)\)", PAGE, re.DOTALL)[1]))
    assert named == {path.stem for path in PRESETS.glob("*.yaml")}


@pytest.mark.parametrize("path", re.findall(r"\]\(\.\./([^)#]+)\)", PAGE))
def test_links_lead_somewhere(path):
    assert (REPOSITORY / path).exists()


MESSAGES = re.findall(r"^\| `([^`]+)` \|", PAGE.split("## Troubles")[1], re.MULTILINE)


@pytest.mark.parametrize("message", MESSAGES)
def test_each_trouble_of_the_page_is_told_in_these_words(message):
    """The longest piece of a message without its values stands in the code."""
    code = "".join(path.read_text() for path in (REPOSITORY / "launch").glob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)
    pieces = re.split(r"…|\bN\b|\b\d\b|drained|NODE_FAIL|given up|lost: job|\(|\)", message)
    assert max(pieces, key=len).strip(" :") in code
