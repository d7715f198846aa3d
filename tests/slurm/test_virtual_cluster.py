"""The four-node cluster that the launcher's tests rely on does what a real one does, faults included."""

import os
import subprocess
import time
from pathlib import Path

import pytest
import submitit

from tests.slurm.cluster import HOSTS, NODES, Cluster
from tests.slurm.packages import why_impossible
from tests.slurm.small_runs import state_of, wait_for_end, wait_until

pytestmark = pytest.mark.slow


def submit(cluster: Cluster, script: str, *options: str) -> str:
    """Submit a batch script and return its job id."""
    return cluster.run("sbatch", "--parsable", "--output=/dev/null", *options, "--wrap", script).strip()


def lines(path: Path) -> list[str]:
    return path.read_text().split("\n")[:-1] if path.exists() else []


def wait_for_lines(path: Path, *wanted: str) -> None:
    wait_until(lambda: lines(path), list(wanted).__eq__, f"{list(wanted)} in {path}")


def test_nodes_are_idle_and_offer_what_was_declared(slurm_cluster):
    assert slurm_cluster.node_states() == dict.fromkeys(NODES, "idle")
    visible = slurm_cluster.run("srun", "--gpus-per-node=2", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert visible.strip() == "0,1"
    bound = slurm_cluster.run("srun", "-n2", "--gpus-per-task=1", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert sorted(bound.split()) == ["0", "1"]
    refused = subprocess.run(["srun", "--gpus-per-node=3", "true"], capture_output=True, text=True)
    assert "Requested node configuration is not available" in refused.stderr


def test_submitit_runs_torch_distributed_on_two_nodes(slurm_cluster, tmp_path):
    def sum_of_ranks() -> tuple[float, str]:
        import torch

        submitit.helpers.TorchDistributedEnvironment().export(overwrite=True)
        torch.distributed.init_process_group("gloo")
        total = torch.tensor([2.0 ** torch.distributed.get_rank()])
        torch.distributed.all_reduce(total)
        torch.distributed.destroy_process_group()  # without it, a rank now and then aborts on its way out
        return total.item(), os.environ["SLURMD_NODENAME"]

    executor = submitit.SlurmExecutor(tmp_path)
    executor.update_parameters(nodes=2, ntasks_per_node=2, time=10)
    job = executor.submit(sum_of_ranks)
    results = job.results()
    assert [total for total, _ in results] == [2.0**4 - 1] * 4
    assert len({node for _, node in results}) == 2
    assert wait_for_end(slurm_cluster, job.job_id) == "COMPLETED"
    accounted = ["sacct", "--noheader", "--allocations", "--parsable2", f"--jobs={job.job_id}", "--format=State"]
    wait_until(lambda: slurm_cluster.run(*accounted).strip(), "COMPLETED".__eq__, "the job's end in accounting")


def test_requeued_job_runs_again(slurm_cluster, tmp_path):
    log = tmp_path / "log"
    job = submit(slurm_cluster, f"echo ${{SLURM_RESTART_COUNT:-0}} >>{log}; [ $SLURM_RESTART_COUNT ] || sleep 1000")
    wait_for_lines(log, "0")
    slurm_cluster.run("scontrol", "requeue", job)
    wait_for_lines(log, "0", "1")
    assert wait_for_end(slurm_cluster, job) == "COMPLETED"


def test_killed_node_goes_down_its_job_moves_and_it_comes_back(slurm_cluster, tmp_path):
    log = tmp_path / "log"
    job = submit(slurm_cluster, f"echo $SLURMD_NODENAME >>{log}; [ $SLURM_RESTART_COUNT ] || sleep 1000")
    [first] = wait_until(lambda: lines(log), len, "the job's start")
    slurm_cluster.kill_node(first)
    wait_until(
        lambda: slurm_cluster.node_states()[first], lambda state: state.startswith("down"), "the node to be down"
    )
    assert wait_until(lambda: lines(log), lambda nodes: len(nodes) == 2, "the job's second start")[1] != first
    assert wait_for_end(slurm_cluster, job) == "COMPLETED"
    slurm_cluster.start_node(first)
    slurm_cluster.wait_until_idle()


def test_jobs_survive_a_restart_of_the_controller(slurm_cluster, tmp_path):
    log, go_on = tmp_path / "log", tmp_path / "go_on"
    job = submit(slurm_cluster, f"echo begin >>{log}; until [ -e {go_on} ]; do sleep 0.1; done; echo end >>{log}")
    wait_for_lines(log, "begin")
    # The controller writes changes to disk every few seconds; kill -9 loses what it has not written. The first new file
    # may be one that it was writing when the job began, and not know of that; the second does.
    written = slurm_cluster.directory / "state" / "job_state"
    for change in ("first", "second"):
        before = time.time_ns()
        slurm_cluster.run("scontrol", "update", f"JobId={job}", f"Comment={change}")
        wait_until(lambda: written.stat().st_mtime_ns, lambda mtime, before=before: mtime > before, f"newer {written}")
    slurm_cluster.kill("slurmctld")
    slurm_cluster.start_controller()
    wait_until(lambda: state_of(slurm_cluster, job), "RUNNING".__eq__, f"job {job} to be known as running")
    go_on.touch()
    assert wait_for_end(slurm_cluster, job) == "COMPLETED"
    assert lines(log) == ["begin", "end"]


def test_an_urgent_job_preempts_with_the_job_s_own_signal(slurm_cluster, tmp_path):
    log = tmp_path / "log"
    script = f"""trap 'echo signal >>{log}; exit 0' USR2; echo begin >>{log}; sleep 1000 & wait"""
    submit(slurm_cluster, script, "--nodes=4", "--exclusive", "--signal=B:USR2@30")
    wait_for_lines(log, "begin")
    slurm_cluster.run("srun", "--partition=urgent", "--immediate=300", "true")
    assert lines(log)[:2] == ["begin", "signal"]


def test_stop_leaves_nothing_behind_and_start_mends_a_crash(tmp_path_factory):
    if reason := why_impossible():
        pytest.skip(reason)
    hosts = HOSTS.read_text()
    cluster = Cluster(tmp_path_factory.mktemp("c"))
    cluster.start()
    old = {name: cluster.pid_of(name) for name in ("munged", "slurmctld", *NODES)}
    cluster.start()
    assert old == {name: cluster.pid_of(name) for name in old}, "a second start must change nothing"
    for name in ("slurmctld", "n0", "munged"):
        cluster.kill(name)
    cluster.start()
    assert cluster.run("srun", "hostname")
    assert not set(old.values()) & {cluster.pid_of(name) for name in old}
    submit(cluster, "sleep 1000")
    cluster.stop()
    cluster.stop()
    assert HOSTS.read_text() == hosts
    ours = str(cluster.directory).encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            assert ours not in (process / "environ").read_bytes() or process.name == str(os.getpid())
        except OSError:
            continue
