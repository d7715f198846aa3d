"""What is remembered of starts and ends, and what is told of it, without any SLURM."""

import json

import pytest

from caduceus.config import Config, save_config
from caduceus.errors import Kind, PeerError, UserError
from caduceus.run.checkpoints import write_marker
from caduceus.run.directory import RunDirectory
from caduceus.run.ends import ends_folder, record_end
from launch import history
from launch.history import Submission, attempts, failures_without_progress, record_attempt, record_submission
from launch.logs import last_error, log_path
from launch.requeue import why_ended
from launch.scheduler import OwnJob
from launch.status import overview

RUNNING = OwnJob(state="RUNNING", reason="None", preempted=False, seconds_left=1e6, excluded="", restarts=0)


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    config = Config()
    config.run.dir, config.run.name, config.train.steps = str(tmp_path / "run"), "run", 100
    run = RunDirectory(tmp_path / "run")
    (run.path / "logs").mkdir(parents=True)
    run.checkpoints_path.mkdir()
    save_config(config, run.config_path)
    return run


def add_checkpoint(run: RunDirectory, step: int) -> None:
    path = run.checkpoint_path(step)
    path.mkdir()
    (path / "weights").write_bytes(bytes(8))
    write_marker(path, step, {})


def test_a_truncated_checkpoint_is_no_progress(run):
    add_checkpoint(run, 50)
    add_checkpoint(run, 100)
    assert history.newest_step(run) == 100
    (run.checkpoint_path(100) / "weights").write_bytes(bytes(4))
    assert history.newest_step(run) == 50


def add_attempt(run: RunDirectory, restart: int, reason: str | None, start: int, end: int, job: str = "7") -> None:
    record_attempt(run, "start", job, restart, nodes="n[0-1]", tasks=2, step=start)
    if reason is not None:
        record_attempt(run, "end", job, restart, reason=reason, step=end, error=None, status=1)


@pytest.mark.parametrize(
    ("ends", "failures"),
    [
        ([("failed", 0, 0)], 1),
        ([("failed", 0, 0), ("failed", 0, 0), ("failed", 0, 0)], 3),
        ([("failed", 0, 0), ("failed", 0, 50), ("failed", 50, 50)], 2),  # a new checkpoint starts the count again
        ([("failed", 0, 50), ("time limit", 50, 50), ("failed", 50, 50)], 2),  # a time limit is no fault
        ([("failed", 50, 50), ("time limit", 50, 60), ("failed", 60, 60)], 1),
        ([(None, 50, 50), ("failed", 50, 50)], 1),  # requeued by hand, or its node died: no end is known
        ([("failed", 0, 0), (None, 0, 0), (None, 0, 0), ("failed", 0, 0)], 2),
        ([("failed", 0, 0), (None, 0, 0), ("failed", 50, 50)], 1),  # what is lost may have saved before
        ([("bad node", 0, 0), ("preempted", 0, 0), ("failed", 0, 0)], 2),
    ],
)
def test_failures_count_until_there_is_a_new_checkpoint(run, ends, failures):
    for restart, (reason, start, end) in enumerate(ends):
        add_attempt(run, restart, reason, start, end)
    assert failures_without_progress(run, ["7"]) == failures
    assert failures_without_progress(run, ["8"]) == 0, "a new submission starts the count again"


def test_a_line_cut_short_by_a_kill_is_passed_over(run):
    add_attempt(run, 0, "failed", 0, 0)
    with (run.path / "attempts.jsonl").open("a") as file:
        file.write('{"event": "st\n')
    add_attempt(run, 1, None, 0, 0)
    assert [attempt.reason for attempt in attempts(run)] == ["failed", None]


def test_nodes_are_known_where_a_bad_one_ended_the_job_before_the_first_rank_wrote_them_down(run):
    record_attempt(run, "bad node", "7", 0, node="n1", nodes="n[0-1]", why="n1: no shared memory")
    record_attempt(run, "end", "7", 0, reason="bad node", step=0, error="n1: no shared memory", status=1)
    (attempt,) = attempts(run)
    assert (attempt.nodes, attempt.bad_nodes, attempt.started) == ("n[0-1]", ["n1"], None)


def test_a_lost_attempt_ended_with_the_checkpoint_that_the_next_one_found(run):
    add_attempt(run, 0, None, 0, 0)
    add_attempt(run, 1, "time limit", 50, 70)
    assert [(attempt.reason, attempt.step) for attempt in attempts(run)] == [("lost", 50), ("time limit", 70)]


SAVED, CRASHED = {0: None, 1: None}, {0: None, 1: ValueError("3")}


def leave_ends(run: RunDirectory, restart: int, ends: dict[int, Exception | None]) -> None:
    for rank, error in ends.items():
        record_end(ends_folder(run.path, "7", restart), rank, error)


@pytest.mark.parametrize(
    ("ends", "next_job", "reason"),
    [
        (SAVED, "7", history.Reason.TAKEN),
        (SAVED, "8", history.Reason.SIGNAL),
        ({0: None}, "7", history.Reason.TAKEN),
        ({1: None}, "7", history.Reason.LOST),
        (CRASHED, "7", history.Reason.LOST),
        ({}, "7", history.Reason.LOST),
    ],
)
def test_ends_of_the_ranks_count_where_their_job_wrote_none(run, ends, next_job, reason):
    add_attempt(run, 1, None, 0, 0)
    leave_ends(run, 1, ends)
    leave_ends(run, 0, SAVED)  # of another attempt
    add_attempt(run, 2, None, 50, 0, job=next_job)
    assert [(attempt.reason, attempt.step) for attempt in attempts(run)] == [(reason, 50), (None, 50)]


@pytest.mark.parametrize(
    ("slurm", "ends", "state", "why"),
    [
        ("TIMEOUT", SAVED, "interrupted", history.Reason.TIME_LIMIT),
        ("PREEMPTED", SAVED, "interrupted", history.Reason.PREEMPTED),
        ("CANCELLED by 1000", SAVED, "cancelled", None),
        ("NODE_FAIL", SAVED, "interrupted", history.Reason.SIGNAL),
        ("", SAVED, "interrupted", history.Reason.SIGNAL),
        ("CANCELLED", CRASHED, "failed", "ValueError: 3"),
        ("CANCELLED", {}, "lost", "job 7 ended as CANCELLED; last sign of life: none"),
    ],
)
def test_the_newest_attempt_ended_as_its_ranks_say(run, fake_slurm, slurm, ends, state, why):
    record_submission(run, Submission(run.path, ["7"], "slurm", run.logs_path, {}))
    add_attempt(run, 0, None, 0, 0)
    add_checkpoint(run, 50)
    leave_ends(run, 0, ends)
    fake_slurm.answer("squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    fake_slurm.answer("sacct", f"echo '{slurm}'")
    now = overview(run)
    assert (now.state, now.why, now.checkpoint) == (state, why, 50)
    assert now.attempts[-1].ended and overview(run).state == state, "written down at the first look"


@pytest.mark.moderate
@pytest.mark.parametrize(
    ("status", "job", "reason"),
    [
        (0, RUNNING, history.Reason.SIGNAL),
        (0, OwnJob("RUNNING", "None", False, 130, "", 0), history.Reason.TIME_LIMIT),
        (0, OwnJob("RUNNING", "None", True, 1e6, "", 0), history.Reason.PREEMPTED),
        (137, RUNNING, history.Reason.FAILED),
        (143, OwnJob("COMPLETING", "TimeLimit", False, 0, "", 0), history.Reason.TIME_LIMIT),
        (143, OwnJob("COMPLETING", "None", False, 1e6, "", 0), history.Reason.TAKEN),
    ],
)
def test_why_a_job_ended(run, status, job, reason):
    assert why_ended(run, status, job, [], signal_seconds=120) == reason
    (run.path / "STOP").touch()
    assert why_ended(run, status, job, [], signal_seconds=120) == (
        history.Reason.FAILED if status else history.Reason.STOPPED
    )
    add_checkpoint(run, 100)
    assert why_ended(run, status, job, [], signal_seconds=120) == history.Reason.COMPLETE


def test_a_failure_on_a_bad_node_is_the_node_s(run):
    assert why_ended(run, 2, RUNNING, ["n3"], signal_seconds=120) == history.Reason.BAD_NODE


LOST = RuntimeError("Connection closed by peer")
PEER = PeerError("rank 1 on n1 failed: ValueError: 3", 1, Kind.CRASH)
KILLED = "srun: error: n1: task 1: Killed\n"


def raised(error: str) -> str:
    return f"Traceback (most recent call last):\n  File 'x.py', line 1\n    raise\n{error}\n"


@pytest.mark.parametrize(
    ("ends", "log", "told"),
    [
        ({}, "quiet\n", None),
        ({0: None, 1: None}, raised("ValueError: caught and logged"), None),
        ({0: LOST, 1: UserError("data.path: none")}, KILLED, "data.path: none"),
        ({0: PEER, 1: ValueError("3")}, "error: something else\n", "ValueError: 3"),
        ({0: PEER}, KILLED, "n1: task 1: Killed"),
        ({0: LOST}, KILLED, "n1: task 1: Killed"),
        ({0: LOST}, KILLED.replace("task 1", "tasks 2,4-6"), "n1: tasks 2,4-6: Killed"),
        ({2: ValueError("3")}, KILLED.replace("task 1: Killed", "task 2: Exited with exit code 1"), "ValueError: 3"),
        ({1: ValueError("3")}, KILLED.replace("task 1", "tasks 0-3"), "ValueError: 3"),
        ({0: LOST}, "", "RuntimeError: Connection closed by peer"),
        ({0: PEER}, "", "rank 1 on n1 failed: ValueError: 3"),
        ({}, raised("ImportError: no torch"), "ImportError: no torch"),
        (
            {},
            raised("ValueError: of an earlier start") + "Starting with JobEnvironment(…)\n" + raised("KeyError: 1"),
            "KeyError: 1",
        ),
    ],
)
def test_the_error_that_says_most(run, ends, log, told):
    for rank, error in ends.items():
        record_end(ends_folder(run.path, "7", 1), rank, error)
    record_end(ends_folder(run.path, "7", 0), 0, UserError("of an earlier attempt"))
    log_path(run.logs_path, "7").write_text(log)
    assert last_error(run, run.logs_path, "7", 1) == told


@pytest.mark.parametrize(
    ("events", "state", "in_silence"),
    [
        ([], "new", "unknown"),
        ([("end", {"reason": "failed"})], "failed", "unknown"),
        ([("end", {"reason": "failed"}), ("gave up", {})], "given up", "given up"),
        ([("end", {"reason": "stopped"})], "stopped", "stopped"),
        ([("end", {"reason": "ended by SLURM"})], "cancelled", "unknown"),
        ([("end", {"reason": "signal"})], "interrupted", "unknown"),
        ([("start", {"nodes": "n0"})], "lost", "unknown"),
    ],
)
def test_states_of_a_run_whose_job_is_gone_or_of_which_slurm_does_not_tell(run, fake_slurm, events, state, in_silence):
    record_submission(run, Submission(run.path, ["7"], "slurm", run.logs_path, {}))
    for event, facts in events:
        record_attempt(run, event, "7", 0, **{"step": 0, "error": None, **facts})
    forgotten = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    silent = "echo 'slurm_load_jobs error: Unable to contact slurm controller (connect failure)' >&2; exit 1"
    for answer, expected in ((forgotten, state), (silent, in_silence)):
        fake_slurm.answer("squeue", answer)
        assert overview(run).state == expected
    add_checkpoint(run, 100)
    assert overview(run).state == "complete"


@pytest.mark.parametrize("squeue", ["echo 'Unable to contact slurm controller' >&2; exit 1", None])
@pytest.mark.parametrize("action", ["stop", "cancel", "resume"])
def test_runs_are_not_steered_while_slurm_does_not_answer(run, fake_slurm, steer, action, squeue):
    record_submission(run, Submission(run.path, ["7"], "slurm", run.logs_path, {}))
    if squeue:
        fake_slurm.answer("squeue", squeue)
    else:
        (fake_slurm.folder / "squeue").unlink()
    with pytest.raises(UserError, match=r"SLURM does not answer \((Unable to contact|no squeue on this machine)"):
        steer(action, str(run.path))
    assert not run.stop_path.exists()


def test_numbers_of_a_run(run):
    rows = [{"step": step, "loss": 1.0, "tokens_per_second": 10.0, "seconds": 2.0} for step in (1, 2, 3)]
    rows.append({"step": 3, "valid_loss": 1.5})
    run.metrics_path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    now = overview(run)
    assert (now.state, now.step, now.steps, now.loss, now.valid_loss) == ("interrupted", 3, 100, 1.0, 1.5)
    assert (now.tokens_per_second, now.seconds_left) == (10.0, None)  # the first steps, which compile, tell none
    with run.metrics_path.open("a") as file:
        file.write(json.dumps({**rows[0], "step": 4, "seconds_left": 500}) + "\n")
    assert overview(run).seconds_left == 500


@pytest.mark.parametrize(("words", "state"), [("ended by SLURM", "cancelled"), ("cancelled", "cancelled")])
def test_a_cancelled_job_is_told_by_type_in_old_histories_as_well(run, words, state):
    record_submission(run, Submission(run.path, ["7"], "local", run.logs_path, {}))
    add_attempt(run, 0, words, 0, 0)
    assert isinstance(attempts(run)[0].reason, history.Reason)
    assert overview(run).state == state


def test_words_of_an_end_that_nobody_wrote_are_told(run):
    add_attempt(run, 0, "eaten", 0, 0)
    with pytest.raises(UserError, match=r"attempts\.jsonl: this version knows no end called 'eaten'"):
        attempts(run)


def test_slurm_is_not_asked_about_a_process_of_this_machine(run, fake_slurm):
    """Its number may be that of anybody's job."""
    record_submission(run, Submission(run.path, ["7"], "local", run.logs_path, {}))
    add_attempt(run, 0, None, 0, 0)
    fake_slurm.answer("sacct", "echo CANCELLED")
    assert overview(run).why == "job 7 on this machine is gone; last sign of life: none"
    assert fake_slurm.asked("squeue") == fake_slurm.asked("sacct") == []
