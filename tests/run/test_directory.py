"""What a run directory trusts, refuses and keeps."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from caduceus.config import Config, config_to_dict
from caduceus.errors import UserError
from caduceus.run.checkpoints import MARKER
from caduceus.run.directory import RunDirectory


def make_config(directory: Path, **train: object) -> Config:
    config = Config()
    config.run.dir, config.run.name = str(directory), "run"
    for key, value in train.items():
        setattr(config.train, key, value)
    return config


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.create_or_resume(make_config(tmp_path / "run"))
    yield run
    run.release()


def write_checkpoint(run: RunDirectory, step: int, **facts: object) -> Path:
    writing = run.checkpoints_path / f".writing-{step:08d}"
    writing.mkdir()
    (writing / "weights").write_bytes(bytes(range(256)) * 16)
    return run.complete_checkpoint(writing, step, {"samples": step * 8, **facts}).path


def test_the_newest_checkpoint_is_found_and_linked(run: RunDirectory) -> None:
    for step in (5, 40, 100):
        path = write_checkpoint(run, step)
    assert run.newest_valid_checkpoint().path == path
    assert (run.checkpoints_path / "latest").resolve() == path.resolve()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: (path / "weights").unlink(), "missing"),
        (lambda path: (path / "weights").write_bytes(b"short"), "5 bytes instead of 4096"),
        (lambda path: (path / "weights").write_bytes(bytes(4096)), "sha256"),
        (lambda path: (path / MARKER).write_text("{"), "marker"),
        (lambda path: (path / MARKER).write_text('{"files": {}, "step": 2}'), "names no files"),
        (lambda path: (path / MARKER).write_text('{"files": ["weights"]}'), "names no files"),
        (lambda path: (path / MARKER).write_text("[]"), "holds no facts"),
        (lambda path: (path / MARKER).write_text('{"files": {"weights": {"bytes": 4096}}}'), "sha256 of weights"),
        (
            lambda path: (path / MARKER).write_text('{"files": {"../weights": {"bytes": 1, "sha256": ""}}}'),
            "../weights",
        ),
        (lambda path: (path / MARKER).write_bytes(b"\xff\xfe"), "marker"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(run: RunDirectory, caplog, damage, named: str) -> None:
    older, newer = write_checkpoint(run, 1), write_checkpoint(run, 2)
    damage(newer)
    assert run.newest_valid_checkpoint().path == older
    assert str(newer) in caplog.text and named in caplog.text


def test_damaged_checkpoints_set_aside_cost_no_valid_one(run: RunDirectory, caplog) -> None:
    _, valid, damaged = (write_checkpoint(run, step) for step in (10, 20, 30))
    (damaged / "weights").write_bytes(b"short")
    assert run.set_aside_damaged_checkpoints().path == valid
    assert f"{damaged}: set aside as damaged-step-00000030" in caplog.text
    assert (run.checkpoints_path / "latest").resolve() == valid.resolve()
    saved = write_checkpoint(run, 21)
    run.remove_old_checkpoints(keep=1)
    assert [checkpoint.path for checkpoint in run.checkpoints()] == [saved]
    assert (run.checkpoints_path / "latest").resolve() == saved.resolve()
    (write_checkpoint(run, 30) / "weights").write_bytes(b"damaged again")
    assert run.set_aside_damaged_checkpoints().path == saved
    names = sorted(path.name for path in run.checkpoints_path.iterdir())
    assert names == ["damaged-step-00000030", "latest", "step-00000021"]


def test_of_damaged_checkpoints_set_aside_as_many_are_kept_as_of_others(run: RunDirectory, caplog) -> None:
    for step in (10, 20, 30, 40):
        (write_checkpoint(run, step) / "weights").write_bytes(b"short")
        assert run.set_aside_damaged_checkpoints() is None
        assert "no checkpoint is whole: the run starts again from its beginning" in caplog.text
    write_checkpoint(run, 5)
    run.remove_old_checkpoints(keep=0)
    assert len(list(run.checkpoints_path.glob("damaged-*"))) == 4
    run.remove_old_checkpoints(keep=2)
    names = sorted(path.name for path in run.checkpoints_path.iterdir())
    assert names == ["damaged-step-00000030", "damaged-step-00000040", "latest", "step-00000005"]
    assert "damaged-step-00000020: removed, as checkpoint.keep=2 newer damaged ones are kept" in caplog.text


def test_sizes_tell_a_truncated_checkpoint_without_reading_it(run: RunDirectory) -> None:
    path = write_checkpoint(run, 1)
    (path / "weights").write_bytes(bytes(4096))
    (checkpoint,) = run.checkpoints()
    assert checkpoint.damage(contents=False) is None and "sha256" in checkpoint.damage()
    (path / "weights").write_bytes(b"short")
    assert "5 bytes instead of 4096" in checkpoint.damage(contents=False)


def test_a_directory_without_its_marker_does_not_count(run: RunDirectory) -> None:
    older, newer = write_checkpoint(run, 1), write_checkpoint(run, 2)
    (newer / MARKER).unlink()
    assert run.newest_valid_checkpoint().path == older


def test_only_the_newest_are_kept_and_leftovers_of_kills_go(run: RunDirectory) -> None:
    for step in range(1, 6):
        write_checkpoint(run, step)
    leftover = run.checkpoints_path / ".writing-00000006"
    leftover.mkdir()
    run.remove_old_checkpoints(keep=2)
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [4, 5]
    assert not leftover.exists()
    run.remove_old_checkpoints(keep=0)
    assert len(run.checkpoints()) == 2


def test_checkpoints_of_every_so_many_steps_are_kept_for_good(run: RunDirectory) -> None:
    for step in range(1, 9):
        write_checkpoint(run, step)
        run.remove_old_checkpoints(keep=2, keep_every=3)
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [3, 6, 7, 8]


def test_a_removal_cut_short_by_a_kill_leaves_nothing_for_good(run: RunDirectory, monkeypatch) -> None:
    def killed(path: Path) -> None:
        (path / "weights").unlink()
        raise KeyboardInterrupt

    for step in (1, 2):
        write_checkpoint(run, step)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("shutil.rmtree", killed)
        run.remove_old_checkpoints(keep=1)
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [2]
    run.remove_old_checkpoints(keep=1)
    assert sorted(path.name for path in run.checkpoints_path.iterdir()) == ["latest", "step-00000002"]


def test_a_step_saved_again_replaces_its_checkpoint(run: RunDirectory) -> None:
    write_checkpoint(run, 1)
    (write_checkpoint(run, 2) / "weights").write_bytes(b"damaged")
    assert write_checkpoint(run, 2) == run.newest_valid_checkpoint().path


@pytest.mark.moderate
def test_another_configuration_is_refused_with_both_values(run: RunDirectory) -> None:
    run.release()
    other = make_config(run.path, lr=1e-3)
    with pytest.raises(UserError, match=r"train.lr=0.008, not 0.001.*run.allow_change=\[train.lr\]"):
        RunDirectory.create_or_resume(other)
    other.run.allow_change = ["train.lr"]
    resumed = RunDirectory.create_or_resume(other)
    assert run.config().train.lr == 8e-3  # until the change has proved to load
    resumed.keep_config(other)
    resumed.release()
    assert RunDirectory.open(run.path).config().train.lr == 1e-3


def edited(config: Config) -> str:
    return OmegaConf.to_yaml(config_to_dict(config)).replace("lr: 0.008", "lr: 0.001")


@pytest.mark.moderate
@pytest.mark.parametrize(
    "harm",
    [
        lambda run, text: run.config_path.write_text(text),
        lambda run, text: run.config_path.write_text(text[: len(text) // 2]),
        lambda run, text: run.config_path.write_text(""),
        lambda run, text: run.config_path.unlink(),
    ],
    ids=["edited", "cut off", "empty", "removed"],
)
def test_a_change_is_seen_by_the_checkpoint_whatever_became_of_config_yaml(run: RunDirectory, harm) -> None:
    config = make_config(run.path)
    write_checkpoint(run, 1, config=config_to_dict(config))
    run.release()
    harm(run, edited(config))
    changed = make_config(run.path, lr=1e-3)
    with pytest.raises(UserError, match=r"train.lr=0.008, not 0.001.*run.allow_change=\[train.lr\]"):
        RunDirectory.create_or_resume(changed)
    changed.run.allow_change = ["train.lr"]
    RunDirectory.create_or_resume(changed).release()
    RunDirectory.create_or_resume(config).release()


@pytest.mark.moderate
def test_before_the_first_checkpoint_config_yaml_may_be_edited(run: RunDirectory) -> None:
    run.release()
    run.config_path.write_text(edited(make_config(run.path)))
    RunDirectory.create_or_resume(run.config()).release()


def test_a_damaged_checkpoint_does_not_say_what_the_run_was_made_with(run: RunDirectory) -> None:
    write_checkpoint(run, 1, config=config_to_dict(make_config(run.path)))
    (write_checkpoint(run, 2, config=config_to_dict(make_config(run.path, lr=1e-3))) / "weights").unlink()
    run.release()
    assert run.former_config().train.lr == 8e-3


@pytest.mark.moderate
@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: (path / MARKER).write_text("{"), "its marker is not readable"),
        (lambda path: (path / MARKER).write_bytes(b""), "its marker is not readable"),
        (lambda path: (path / "weights").unlink(), "weights is missing"),
    ],
)
def test_a_refusal_names_the_damaged_checkpoint_that_it_could_not_compare_with(
    run: RunDirectory, damage: Callable[[Path], object], named: str
) -> None:
    changed = make_config(run.path, lr=1e-3)
    write_checkpoint(run, 1, config=config_to_dict(make_config(run.path)))
    newest = write_checkpoint(run, 2, config=config_to_dict(changed))
    run.release()
    RunDirectory.create_or_resume(changed).release()
    damage(newest)
    with pytest.raises(
        UserError, match=rf"compared with an older one, as step-00000002 is damaged: {named}"
    ) as refusal:
        RunDirectory.create_or_resume(changed)
    assert "\n" not in str(refusal.value)
    changed.run.allow_change = ["train.lr"]
    RunDirectory.create_or_resume(changed).release()


def test_settings_that_do_not_decide_the_numbers_may_change(run: RunDirectory) -> None:
    run.release()
    other = make_config(run.path, micro_batch=4)
    other.data.workers, other.valid.every, other.checkpoint.keep = 0, 7, 1
    RunDirectory.create_or_resume(other).release()


def test_a_second_process_is_refused(run: RunDirectory, monkeypatch) -> None:
    monkeypatch.setattr("caduceus.run.lock.ENDING_SECONDS", 0.1)
    assert RunDirectory(run.path).is_in_use()
    with pytest.raises(UserError, match=rf"another process is training in .* \(process {os.getpid()} on "):
        RunDirectory.create_or_resume(make_config(run.path))
    run.release()
    assert not RunDirectory(run.path).is_in_use()


def test_a_process_that_is_shut_out_completes_no_checkpoint(run: RunDirectory) -> None:
    older = write_checkpoint(run, 1)
    assert not run.is_taken_over()
    RunDirectory(run.path).shut_out_holder()
    assert run.is_taken_over(), "before the next process is there"
    successor = RunDirectory.create_or_resume(make_config(run.path))
    assert run.is_taken_over() and not successor.is_taken_over()
    with pytest.raises(UserError, match="was taken over by another process"):
        write_checkpoint(run, 2)
    assert successor.newest_valid_checkpoint().path == older
    write_checkpoint(successor, 3)
    run.release()
    assert RunDirectory(run.path).is_in_use(), "what the first process held was not the successor's"
    successor.release()


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="something other than a run"):
        RunDirectory.create_or_resume(make_config(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("wish", ["STOP", "SAVE"])
def test_a_wish_that_comes_before_the_run_is_no_other_use_of_the_directory(tmp_path: Path, wish: str) -> None:
    (tmp_path / wish).touch()
    run = RunDirectory.create_or_resume(make_config(tmp_path))
    assert run.config_path.is_file() and (tmp_path / wish).is_file()
    run.release()


def test_metrics_after_the_checkpoint_are_dropped_with_a_torn_last_line(run: RunDirectory) -> None:
    rows = [{"step": step, "loss": 1.0 / step} for step in range(1, 6)]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "lo'
    run.metrics_path.write_text(text)
    assert run.metrics() == rows
    run.truncate_metrics(3)
    assert run.metrics() == rows[:3]


def test_provenance_keeps_every_start(run: RunDirectory) -> None:
    run.write_provenance({"step": 0})
    run.write_provenance({"step": 9})
    starts = json.loads(run.provenance_path.read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 9]
    assert starts[0]["packages"]["torch"] and starts[0]["host"]
