"""What a submission leaves in a run directory: all of it, or nothing."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from caduceus.errors import UserError
from caduceus.run.directory import RunDirectory
from caduceus.run.lock import RunLock
from launch.history import submissions
from launch.preparation import prepared
from launch.submission import REPOSITORY
from tests import preloaded
from tests.train.test_starts import config_of

REQUEST = ("--cluster", "cpu")
REFUSAL = "echo 'sbatch: error: Memory specification can not be satisfied' >&2; exit 1"
ACCEPTS_TESTS_ONLY = 'case "$*" in *--test-only*) exit 0;; esac; ' + REFUSAL


@pytest.fixture
def run(launch, fake_slurm, small_config) -> RunDirectory:
    """A run submitted on one node, whose job is over."""
    assert launch("--config", small_config, *REQUEST, "run.dir=run") == 0
    return RunDirectory("run")


@pytest.mark.moderate
def test_the_job_gets_the_changed_settings(run, launch, small_config):
    changed = ["train.micro_batch=1", "checkpoint.every=1", "train.lr=1e-3", "run.allow_change=[train.lr]"]
    assert launch("--config", small_config, *REQUEST, "--nodes", "2", "run.dir=run", *changed) == 0
    config = run.config()
    assert (config.train.micro_batch, config.checkpoint.every, config.train.lr) == (1, 1, 1e-3)


@pytest.mark.moderate
def test_resuming_changes_settings_and_nodes(run, steer):
    assert steer("resume", "run", "--nodes", "2", "train.micro_batch=1", "parallel.context=2") == 0
    assert (run.config().train.micro_batch, run.config().parallel.context) == (1, 2)
    assert submissions(run)[-1].request["nodes"] == 2
    with pytest.raises(UserError, match=r"holds a run with train\.lr=0\.008, not 0\.001"):
        steer("resume", "run", "train.lr=1e-3")
    assert len(submissions(run)) == 2


@pytest.mark.moderate
@pytest.mark.parametrize("refusal", [REFUSAL, ACCEPTS_TESTS_ONLY])
def test_a_refused_submission_changes_nothing(run, launch, fake_slurm, small_config, refusal):
    run.stop_path.touch()
    before = run.config_path.read_text()
    fake_slurm.answer("sbatch", refusal)
    with pytest.raises(UserError, match="Memory specification"):
        launch("--config", small_config, *REQUEST, "run.dir=run", "train.micro_batch=1")
    assert run.config_path.read_text() == before and run.stop_path.exists()


@pytest.mark.moderate
@pytest.mark.parametrize("refusal", [REFUSAL, ACCEPTS_TESTS_ONLY])
@pytest.mark.parametrize("sweep", [[], ["--sweep", "train.lr=1e-3,8e-3"]])
def test_a_refused_new_run_leaves_no_directory(launch, fake_slurm, small_config, tmp_path, refusal, sweep):
    fake_slurm.answer("sbatch", refusal)
    with pytest.raises(UserError, match="Memory specification"):
        launch("--config", small_config, *REQUEST, "run.dir=run", *sweep)
    assert not list(tmp_path.glob("run*"))


@pytest.mark.moderate
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "-1"], "nodes: must be at least 1, got -1"),
        (["--nodes", "0"], "nodes: must be at least 1, got 0"),
        (["--nodes", "2", "train.micro_batch=8", "parallel.context=1", "parallel.strands=1"], "is not a multiple of"),
        (["run.dir=other"], "run.dir: a run is resumed in its own directory"),
    ],
)
def test_a_run_is_not_resumed_by_a_request_that_cannot_be_meant(run, steer, fake_slurm, arguments, message):
    with pytest.raises(UserError, match=message):
        steer("resume", "run", *arguments)
    assert len(submissions(run)) == len(fake_slurm.asked("sbatch")) == 1


@pytest.mark.moderate
def test_a_run_of_this_machine_is_not_resumed_on_several_nodes(run, steer, fake_slurm):
    fake_slurm.answer("ps", "exit 1")
    path = run.path / "submissions.json"
    path.write_text(path.read_text().replace('"slurm"', '"local"'))
    with pytest.raises(UserError, match="nodes: this machine is one node, not 2"):
        steer("resume", "run", "--nodes", "2")


def test_a_mistake_in_a_deepspeed_file_is_seen_before_submitting(launch, fake_slurm, small_config, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"overlap_com": true}}')
    settings = ["parallel.strategy=deepspeed", "parallel.deepspeed_config=ds.json"]
    with pytest.raises(UserError, match=r"ds\.json sets zero_optimization\.overlap_com, which is not"):
        launch("--config", small_config, *REQUEST, "run.dir=run", *settings)
    assert not fake_slurm.asked("sbatch") and not (tmp_path / "run").exists()


def start(small_config: str, *arguments: str) -> subprocess.Popen:
    """launch/slurm.py as a process of its own."""
    line = [sys.executable, str(REPOSITORY / "launch" / "slurm.py"), "--config", small_config, *REQUEST, *arguments]
    return preloaded.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(("first_is_refused", "statuses"), [(False, [0, 2]), (True, [0, 2])])
def test_of_two_submissions_of_a_run_at_once_one_is_taken(
    launch, fake_slurm, small_config, tmp_path, first_is_refused, statuses
):
    taken, refused = tmp_path / "taken", tmp_path / "refused"
    fake_slurm.answer("squeue", f"[ ! -e {taken} ] || echo '7|7_N/A|PENDING|Priority'")
    refusal = f"[ -e {refused} ] || {{ : > {refused}; {REFUSAL}; }}; " if first_is_refused else ""
    # sbatch takes its time: the other one comes to its own sbatch meanwhile, unless it waits.
    submits = f'case "$*" in *--test-only*) exit 0;; esac; /bin/sleep 2; {refusal}: > {taken}'
    fake_slurm.answer("sbatch", f'{submits}; echo "Submitted batch job 7"')
    both = [start(small_config, "run.dir=run") for _ in range(2)]
    told = [process.communicate(timeout=120) for process in both]
    assert sorted(process.returncode for process in both) == statuses, told
    assert len(submissions(RunDirectory("run"))) == 1 and RunDirectory("run").config_path.exists()
    other = next(err for process, (_, err) in zip(both, told, strict=True) if process.returncode)
    if first_is_refused:  # the one that waited starts anew, in a directory of its own
        assert "Memory specification" in other and len(fake_slurm.asked("sbatch")) == 2
    else:
        assert "run.dir: run is in use by job 7; wait for it, or: python launch/runs.py stop run" in other
        assert len(fake_slurm.asked("sbatch")) == 1


@pytest.mark.moderate
def test_a_run_with_a_live_job_is_not_started_here_either(run, launch, fake_slurm, small_config):
    fake_slurm.answer("squeue", "echo '7|7_N/A|RUNNING|None'")
    for cluster in ("local", "debug"):
        with pytest.raises(UserError, match="run is in use by job 7"):
            launch("--config", small_config, "--cluster", cluster, "run.dir=run")


@pytest.mark.moderate
def test_commands_to_come_are_quoted_for_the_shell(launch, fake_slurm, small_config, steer, capsys):
    assert launch("--config", small_config, *REQUEST, "run.dir=a run; exit") == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("next:")]
    command = line.removeprefix("next:").split("   (")[0]
    assert shlex.split(command) == ["python", "launch/runs.py", "status", "a run; exit"]
    fake_slurm.answer("squeue", "echo '7|7_N/A|PENDING|Priority'")
    with pytest.raises(UserError, match=r"stop it first: python launch/runs\.py stop 'a run; exit'"):
        steer("resume", "a run; exit")
    fake_slurm.answer("scancel", "exit 0")
    assert steer("stop", "a run; exit") == 0
    assert "python launch/runs.py resume 'a run; exit' goes on" in capsys.readouterr().out


def test_a_submission_is_not_disturbed_by_one_that_is_refused_and_removes_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path / "shards", tmp_path / "run", steps=4)
    take, remove, removed = RunLock.take, shutil.rmtree, []

    def take_from_under(lock: RunLock) -> None:
        if not removed:
            removed.append(lock.path.parent)
            remove(tmp_path / "run")
        take(lock)

    def rmtree(path: Path, **options: bool) -> None:
        removed.append(path)
        assert not (tmp_path / "run").exists(), "others see the whole directory or none"
        remove(path, **options)

    monkeypatch.setattr(RunLock, "take", take_from_under)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(KeyboardInterrupt), prepared([config], tmp_path / "run") as [run]:
        assert run.config() == config
        raise KeyboardInterrupt
    assert len(removed) > 1 and not list(tmp_path.iterdir())
