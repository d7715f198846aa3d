"""What `pip install` gives someone who has no checkout: commands, presets, and jobs that keep the code they run."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

from caduceus.commands import COMMANDS
from caduceus.config import load_config
from caduceus.run.directory import RunDirectory
from tests.conftest import REPOSITORY, write_random_fasta

OWN = (
    "model.d_model=16 model.n_layer=1 model.d_state=4 data.seq_len=64 data.workers=0 train.global_batch=2 "
    "train.micro_batch=2 train.steps=2 valid.samples=4 run.device=cpu ops.backend=naive wandb.mode=disabled "
    "monitor.report=false monitor.windows=0"
)
"""Makes a preset's run small; the CPU kernels would have to be compiled first."""


class Installation:
    """An environment of its own with the wheel, and the packages of this one."""

    def __init__(self, directory: Path) -> None:
        source, self.bin, self.home = directory / "source", directory / "venv" / "bin", directory / "home"
        self.home.mkdir()
        for name in ("caduceus", "configs", "data_prep", "launch"):  # a build leaves files behind
            shutil.copytree(REPOSITORY / name, source / name, symlinks=True)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(REPOSITORY / name, source)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", directory / "venv"], check=True)
        (packages,) = (directory / "venv" / "lib").glob("python*/site-packages")
        others = [path for path in sys.path if path.endswith("site-packages")]
        (packages / "others.pth").write_text("".join(f"{path}\n" for path in others))
        pip = [sys.executable, "-m", "pip", "--quiet"]
        wheels = directory / "wheels"
        subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source], check=True)
        (self.wheel,) = wheels.glob("caduceus-*.whl")
        pip += ["--python", str(self.bin / "python"), "install", "--no-deps", str(self.wheel)]
        subprocess.run(pip, check=True)
        shutil.rmtree(source)

    def call(self, line: str, status: int = 0) -> str:
        """What a command prints, called in an empty folder."""
        name, *arguments = line.split()
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [self.bin / name, *arguments], cwd=self.home, env=environment, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Installation:
    return Installation(tmp_path_factory.mktemp("wheel"))


def test_every_command_of_the_wheel_is_there() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text()
    lines = text.partition("[project.scripts]\n")[2].partition("\n\n")[0].splitlines()
    scripts = dict(line.replace('"', "").split(" = ") for line in lines)
    assert sorted(scripts) == sorted(COMMANDS)
    for target in scripts.values():
        module, _, function = target.partition(":")
        assert callable(getattr(import_module(module), function))


@pytest.mark.slow
def test_the_wheel_has_the_presets_as_they_are_in_the_repository(installation: Installation) -> None:
    with zipfile.ZipFile(installation.wheel) as wheel:
        found = {name: wheel.read(name) for name in wheel.namelist() if name.startswith("caduceus/configs/")}
    files = {path for path in (REPOSITORY / "configs").rglob("*") if path.is_file()}
    assert found == {f"caduceus/{path.relative_to(REPOSITORY)}": path.read_bytes() for path in files}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_called_with_nothing_says_what_comes_next(installation: Installation, name: str) -> None:
    said = installation.call(name, status=2)
    assert f"\n  {name} " in said and "python" not in said


@pytest.mark.slow
def test_genomes_become_a_published_model_without_a_checkout(installation: Installation) -> None:
    write_random_fasta(installation.home / "my.fa", 1, {"chr1": 9_000, "chr2": 5_000})
    installation.call("caduceus-shard --fasta my.fa --species mine --window 1024 --valid-contigs chr2 --out shards")
    assert "\n  ps-131k " in installation.call("caduceus-train --config list")
    assert installation.call("caduceus-train --help").startswith("usage: caduceus-train ")
    own = f"data.path=shards run.dir=runs/one {OWN}"
    shown = installation.call(f"caduceus-train --config ps-1k --show {own}")
    installation.call(f"caduceus-train --config ps-1k {own}")
    run = RunDirectory.open(installation.home / "runs" / "one")
    (installation.home / "shown.yaml").write_text(shown)
    assert load_config(installation.home / "shown.yaml") == run.config()
    assert [row["step"] for row in run.metrics() if "loss" in row] == [1, 2]
    (start,) = run.starts()
    assert start["git_commit"] is None and start["packages"]["caduceus"]
    assert "valid_loss" in json.loads(installation.call("caduceus-evaluate heldout --run runs/one"))
    installation.call("caduceus-hub export --run runs/one --out export")
    assert (installation.home / "export" / "model.safetensors").is_file()
    assert "complete" in installation.call("caduceus-runs list")


@pytest.mark.slow
def test_a_job_of_an_installed_package_runs_a_copy_of_it(installation: Installation, small_shards: Path) -> None:
    own = f"data.path={small_shards} run.dir=runs/job {OWN}"
    installation.call(f"caduceus-launch --config ps-1k --cluster local {own}")
    code = installation.home / "runs" / "job" / "code"
    assert (code / "caduceus" / "configs" / "pretrain" / "ps-1k.yaml").is_file()
    assert (code / "launch" / "job.py").is_file() and (code / "data_prep").is_dir()
    assert json.loads((code / "code_version.json").read_text()) == {"git_commit": None, "git_diff": None}
    assert "complete" in installation.call("caduceus-runs status runs/job")
