"""launch/slurm.py --check: the doctor on the nodes that a job would get."""

import pytest

from launch import check
from launch.request import load_request


def test_the_nodes_of_the_request_are_asked_of_srun(fake_slurm, launch) -> None:
    options = ["--partition", "gpu", "--account", "lab", "--sbatch", "mail-type=END"]
    assert launch("--check", "--nodes", "2", "--cluster", "h100x8", *options, "run.dir=/shared/runs/x") == 0
    [asked] = [line for line in (fake_slurm.folder / "asked").read_text().split("srun ") if "check" in line]
    for option in ("--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--partition=gpu", "--account=lab"):
        assert option in asked.split(), option
    assert "--time=15" in asked.split() and "mail-type" not in asked and "requeue" not in asked
    assert "-m launch.check /shared/runs auto" in asked and "NCCL_SOCKET_IFNAME" in asked


def test_without_slurm_it_says_so(launch) -> None:
    with pytest.raises(check.UserError, match="no srun on this machine"):
        launch("--check", "--nodes", "2")


def test_a_task_started_by_hand_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["check.py"])
    with pytest.raises(check.UserError, match="starts this"):
        check.main()


@pytest.mark.slow
def test_the_processes_of_this_machine_are_looked_at(monkeypatch, tmp_path, capfd) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    request = load_request("local", {"tasks_per_node": 2})
    assert check.check(request, tmp_path, "cpu") == 0
    told = capfd.readouterr().out
    assert told.startswith("2 ranks on 1 node: ") and "in a node, 2 ranks: all-reduce" in told
