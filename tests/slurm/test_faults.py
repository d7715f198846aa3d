"""Runs on a real SLURM come back by themselves, and end as if nothing had happened."""

import contextlib
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from caduceus.errors import Kind
from caduceus.run.directory import RunDirectory
from caduceus.run.ends import ends_folder, read_ends
from launch import history
from launch.history import attempts
from launch.scheduler import IN_QUEUE, own_job
from launch.status import WAITING, overview
from tests.slurm.small_runs import (
    REQUEST,
    STEPS,
    Setting,
    assert_undisturbed,
    has_pending_signal,
    held,
    hosts,
    job_of,
    last_step,
    launch,
    process_of,
    reasons,
    runs,
    state_of,
    wait_for,
    wait_for_end,
    wait_until,
    wait_until_training,
)

pytestmark = pytest.mark.slow


def signal_requeue_and_a_killed_rank(on: Setting) -> None:
    run = on.directory / "run"
    job = job_of(on.launch(*REQUEST, "--nodes", "2", f"run.dir={run}"))
    wait_until_training(run, 1)
    on.cluster.run("scancel", "--signal=USR2", job)
    wait_until_training(run, 2)
    on.cluster.run("scontrol", "requeue", job)
    wait_until_training(run, 3)
    os.kill(process_of(run, rank=1), signal.SIGKILL)
    wait_until_training(run, 4)
    assert wait_for_end(on.cluster, job) == "COMPLETED"
    signalled, requeued, *others = reasons(run)
    assert signalled == history.Reason.SIGNAL and others == [history.Reason.FAILED, history.Reason.COMPLETE]
    saved = len(read_ends(ends_folder(run, job, 1))) == 2  # SLURM's KillWait may be too short
    assert requeued == (history.Reason.TAKEN if saved else history.Reason.LOST)
    killed = attempts(RunDirectory(run))[2]
    assert "Killed" in killed.error and not killed.gave_up
    assert_undisturbed(run, on.undisturbed)


def end_in_minutes(on: Setting, job: str, count: int) -> None:
    """Let a job end with the minute that it is in, the first of `count`, however slowly its processes started."""
    minutes = on.cluster.run("squeue", "--noheader", f"--jobs={job}", "--Format=TimeUsed").strip().split(":")[-2]
    on.cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={int(minutes) + count}")


def give_an_hour_once_requeued(on: Setting, job: str) -> None:
    wait_until(lambda: state_of(on.cluster, job), IN_QUEUE.__contains__, "the job to go back into the queue")
    on.cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")


def the_time_limit(on: Setting) -> None:
    preset = on.directory / "in-time.yaml"
    preset.write_text("executor: slurm\ncpus_per_task: 1\nmem: 500M\ntime: '60'\nsignal_seconds: 180\n")
    run = on.directory / "run"
    job = job_of(on.launch("--cluster", preset, "--nodes", "2", f"run.dir={run}"))
    wait_until_training(run, 1)
    log = run / "logs" / f"{job}_0_log.out"
    with held(run) as rank:  # so that the run is not over before its time is up
        assert last_step(run) < STEPS
        end_in_minutes(on, job, 3)  # so the signal is due at once, and leaves a busy machine two minutes to save
        wait_for(
            lambda: "SIGUSR2" in log.read_text() or has_pending_signal(rank, signal.SIGUSR2),
            "SLURM's signal before the time limit",
        )
    give_an_hour_once_requeued(on, job)
    assert wait_for_end(on.cluster, job) == "COMPLETED"
    assert reasons(run) == [history.Reason.TIME_LIMIT, history.Reason.COMPLETE]
    assert_undisturbed(run, on.undisturbed)


def a_save_that_outlasts_the_time_limit(on: Setting) -> None:
    """On a disk whose fsync takes an hour while there is a file `slow`."""
    preset, slow = on.directory / "slow-disk.yaml", on.directory / "slow"
    request = "executor: slurm\ncpus_per_task: 1\nmem: 500M\ntime: '60'\nsignal_seconds: 5\n"
    preset.write_text(f"{request}env: {{PYTHONPATH: {on.directory}}}\n")
    (on.directory / "sitecustomize.py").write_text(
        "import os, time\nfsync = os.fsync\n"
        f"os.fsync = lambda file: (time.sleep(3600 * os.path.exists({str(slow)!r})), fsync(file))[1]\n"
    )
    run = on.directory / "run"
    job = job_of(on.launch("--cluster", preset, "--nodes", "2", f"run.dir={run}"))
    wait_until_training(run, 1)
    slow.touch()
    end_in_minutes(on, job, 1)
    give_an_hour_once_requeued(on, job)
    slow.unlink()
    assert wait_for_end(on.cluster, job) == "COMPLETED"
    first, last = attempts(RunDirectory(run))
    assert (first.reason, last.reason) == (history.Reason.UNSAVED, history.Reason.COMPLETE)
    assert first.step < STEPS and "signal_seconds: 5 s are too short for a checkpoint" in first.error
    assert_undisturbed(run, on.undisturbed)


def a_run_that_fails_at_the_same_step_is_given_up(on: Setting) -> None:
    run = on.directory / "run"
    diverging = ["train.lr=1e30", "train.warmup_steps=0", "train.max_skipped_steps=0", "checkpoint.every=100"]
    job = job_of(on.launch(*REQUEST, f"run.dir={run}", *diverging))
    assert wait_for_end(on.cluster, job) == "FAILED"
    assert reasons(run) == [history.Reason.FAILED] * 3
    assert [attempt.gave_up for attempt in attempts(RunDirectory(run))] == [False, False, True]
    log = (run / "logs" / f"{job}_0_log.out").read_text()
    assert "given up after 3 failures without a new checkpoint; the last one: train.max_skipped_steps: loss" in log
    assert "state       given up: train.max_skipped_steps: loss" in runs(on.directory, "status", run)


def a_mistake_is_not_repeated(on: Setting) -> None:
    run = on.directory / "run"
    job = job_of(on.launch(*REQUEST, "--nodes", "2", f"run.dir={run}", "ops.backend=triton"))
    assert wait_for_end(on.cluster, job) == "FAILED"
    [only] = attempts(RunDirectory(run))
    assert only.gave_up and "ops.backend: 'triton'" in only.error
    assert "state       given up: ops.backend: 'triton'" in runs(on.directory, "status", run)


def a_loader_worker_that_is_killed_before_the_first_step(on: Setting) -> None:
    """Its rank crashes, and the innocent one that shares its sequences must not count as a mistake of the user."""
    run, killed = on.directory / "run", on.directory / "killed"
    preset = on.directory / "deadly.yaml"
    request = "executor: slurm\ncpus_per_task: 1\nmem: 500M\n"
    preset.write_text(f"{request}env: {{PYTHONPATH: {on.directory}}}\n")
    (on.directory / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "def die():\n"
        "    frame, names = sys._getframe(), set()\n"
        "    while frame := frame.f_back:\n"
        "        names.add(frame.f_code.co_filename)\n"
        "    in_loader = any(name.endswith('torch/utils/data/dataloader.py') for name in names)\n"
        "    if in_loader and os.environ.get('SLURM_PROCID') == '1':\n"
        f"        os.close(os.open({str(killed)!r}, os.O_CREAT | os.O_EXCL))\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        f"if not os.path.exists({str(killed)!r}):\n"
        "    os.register_at_fork(after_in_child=die)\n"
    )
    shared = ["--nodes", "2", "parallel.context=2", "data.workers=1", "train.steps=2", f"run.dir={run}"]
    job = job_of(on.launch("--cluster", preset, *shared))
    assert wait_for_end(on.cluster, job) == "COMPLETED"
    assert killed.exists()
    first, second = attempts(RunDirectory(run))
    assert (first.reason, first.refused, first.gave_up) == (history.Reason.FAILED, False, False)
    ends = read_ends(ends_folder(run, job, 0))
    assert {rank: end.kind for rank, end in ends.items()} in (
        {0: Kind.PEER, 1: Kind.CRASH},
        {1: Kind.CRASH},  # srun may end the other rank before it has told
    )
    assert "worker" in first.error and second.reason == history.Reason.COMPLETE


def first_node_is_bad(directory: Path) -> Path:
    """A prolog of tasks by which the first node that the job comes to fails its checks; DIRECTORY/bad names it."""
    prolog, bad = directory / "prolog.sh", directory / "bad"
    prolog.write_text(
        f"#!/bin/sh\n(set -C; echo $SLURMD_NODENAME >{bad}) 2>/dev/null\n"
        f'[ $SLURMD_NODENAME = "$(cat {bad})" ] && echo export SLURM_TMPDIR=/proc/none\nexit 0\n'
    )
    prolog.chmod(0o755)
    return prolog


def a_bad_node_is_left_out(on: Setting) -> None:
    run, prolog = on.directory / "run", first_node_is_bad(on.directory)
    request = [*REQUEST, "--nodes", "2", f"--srun=--task-prolog={prolog}", "train.steps=2", f"run.dir={run}"]
    job = job_of(on.launch(*request))
    assert wait_for_end(on.cluster, job) == "COMPLETED"
    first, second = attempts(RunDirectory(run))
    node = (on.directory / "bad").read_text().strip()
    assert node in hosts(on.cluster, first.nodes)
    assert (first.reason, first.bad_nodes) == (history.Reason.BAD_NODE, [node])
    assert "/proc/none" in first.error
    assert node not in hosts(on.cluster, second.nodes)
    assert second.reason == history.Reason.COMPLETE


SCENARIOS = [
    a_loader_worker_that_is_killed_before_the_first_step,
    a_bad_node_is_left_out,
    the_time_limit,
    a_save_that_outlasts_the_time_limit,
    signal_requeue_and_a_killed_rank,
    a_run_that_fails_at_the_same_step_is_given_up,
    a_mistake_is_not_repeated,
]


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_among_other_runs(at_once, scenario):
    at_once[scenario].result()


def test_a_dead_controller_a_dead_node_and_a_dead_slurmd(slurm_cluster, config, undisturbed, tmp_path):
    pair, alone, cut = (tmp_path / name for name in ("pair", "alone", "cut"))
    requests = {pair: ["--nodes", "2"], alone: [], cut: ["--exclude", "n[0-1]"]}
    requests = {run: [*REQUEST, "--sbatch", "hold", *request] for run, request in requests.items()}
    with ThreadPoolExecutor(len(requests)) as threads:  # each takes seconds to start Python
        started = {
            run: threads.submit(launch, tmp_path, "--config", config, *request, f"run.dir={run}")
            for run, request in requests.items()
        }
        jobs = {run: job_of(result.result()) for run, result in started.items()}
    for job in jobs.values():  # one after the other, as the nodes that each gets depend on the order
        slurm_cluster.run("scontrol", "release", job)
        wait_until(lambda job=job: state_of(slurm_cluster, job), "RUNNING".__eq__, "its start")
    with contextlib.ExitStack() as stack:
        first = {}
        for run, nodes in {pair: "n[0-1]", alone: "n0", cut: "n2"}.items():
            assert wait_until_training(run, 1).nodes == nodes
            first[run] = stack.enter_context(held(run))
        slurm_cluster.kill("slurmctld")
        rank = process_of(pair, rank=1)
        os.kill(rank, signal.SIGKILL)  # now the batch script wants to requeue, and nobody answers
        wait_for(lambda: not Path(f"/proc/{rank}").exists(), "the rank's death")
        assert last_step(cut) < STEPS
        slurm_cluster.kill_node("n2")  # SLURM takes its time to see that, while the pair starts again
        slurm_cluster.start_controller()
        assert wait_until_training(pair, 2).nodes == "n[0-1]"
        peer = stack.enter_context(held(pair))
        slurm_cluster.kill("n0")  # its processes live on
        wait_for(lambda: len(attempts(RunDirectory(alone))) == 2, "SLURM to start the run anew")
        assert all(last_step(run) < STEPS for run in (pair, alone))
    # What is left on n0 goes on: one without its peer, one beside the new attempt, whose the run directory now is.
    ends = {
        pair: [history.Reason.FAILED, history.Reason.COMPLETE],
        alone: [history.Reason.COMPLETE],
        cut: [history.Reason.COMPLETE],
    }
    for run, job in jobs.items():
        assert wait_for_end(slurm_cluster, job) == "COMPLETED"
        *before, lost, last = attempts(RunDirectory(run))
        assert [attempt.reason for attempt in (*before, last)] == ends[run]
        assert lost.reason in (history.Reason.LOST, history.Reason.TAKEN)
        assert not {"n0", "n2"} & set(hosts(slurm_cluster, last.nodes))
        assert_undisturbed(run, undisturbed)
    for survivor in (peer, first[alone]):
        wait_for(lambda pid=survivor: not Path(f"/proc/{pid}").exists(), "the end of what SLURM has lost")
    log = (alone / "logs" / f"{jobs[alone]}_0_log.out").read_text()
    assert f"taken over from process {first[alone]} of SLURM job {jobs[alone]}" in log
    assert "was taken over by another process; this one ends without saving" in log


def test_spare_nodes_take_the_place_of_a_bad_and_of_a_lost_one(slurm_cluster, config, undisturbed, tmp_path):
    """Without giving the nodes back: the job is never requeued."""
    run, request = tmp_path / "run", [*REQUEST, "--nodes", "2", "--spare", "2"]
    request.append(f"--srun=--task-prolog={first_node_is_bad(tmp_path)}")
    job = job_of(launch(tmp_path, "--config", config, *request, f"run.dir={run}"))
    second = wait_until_training(run, 2)
    bad = (tmp_path / "bad").read_text().strip()
    _, lost = hosts(slurm_cluster, second.nodes)
    with held(run):
        assert last_step(run) < STEPS
        slurm_cluster.kill_node(lost)
    assert wait_for_end(slurm_cluster, job) == "COMPLETED"
    assert reasons(run) == [history.Reason.BAD_NODE, history.Reason.NODE_LOST, history.Reason.COMPLETE]
    first, second, third = (set(hosts(slurm_cluster, attempt.nodes)) for attempt in attempts(RunDirectory(run)))
    assert bad in first and bad not in second | third and lost in second and lost not in third
    assert len(first) == len(second) == len(third) == 2
    assert own_job(job).restarts == 0
    log = (run / "logs" / f"{job}_0_log.out").read_text()
    assert f"{bad} failed its checks; the run goes on on {', '.join(sorted(second))} of the same job" in log
    assert f"{lost} lost; the run goes on on {', '.join(sorted(third))} of the same job" in log
    assert_undisturbed(run, undisturbed)


def test_preemption_by_an_urgent_job(slurm_cluster, config, undisturbed, tmp_path):
    run, go_on = tmp_path / "run", tmp_path / "go_on"
    request = [*REQUEST, "--nodes", "2", "--sbatch", "exclusive"]
    job = job_of(launch(tmp_path, "--config", config, *request, f"run.dir={run}"))
    wait_until_training(run, 1)
    urgent = ["--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null"]
    slurm_cluster.run("sbatch", *urgent, "--wrap", f"until [ -e {go_on} ]; do sleep 0.1; done")
    wait_for(lambda: overview(RunDirectory(run)).state == WAITING, "the run to make way")
    saved = overview(RunDirectory(run))
    assert saved.jobs == [job] and 0 < saved.step == saved.checkpoint < STEPS
    assert [attempt.reason for attempt in saved.attempts] == [history.Reason.PREEMPTED]
    status = runs(tmp_path, "status", run)
    assert "state       waiting: " in status and f"checkpoint {saved.step}: preempted" in status
    go_on.touch()
    assert wait_for_end(slurm_cluster, job) == "COMPLETED"
    assert reasons(run) == [history.Reason.PREEMPTED, history.Reason.COMPLETE]
    assert_undisturbed(run, undisturbed)
