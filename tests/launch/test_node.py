"""What a process sets and checks on its node."""

from pathlib import Path

import pytest

from caduceus.errors import NodeError
from launch.node import check_node, node_defaults, own_slice, visible_gpus


def test_threads_follow_the_request_and_caches_lie_on_the_node():
    defaults = node_defaults({"SLURM_CPUS_PER_TASK": "12", "SLURM_TMPDIR": "/local/77"})
    assert defaults["OMP_NUM_THREADS"] == defaults["NUMBA_NUM_THREADS"] == "12"
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        assert Path("/local/77") in Path(defaults[name]).parents
    assert "OMP_NUM_THREADS" not in node_defaults({})


def test_a_node_without_a_disk_of_its_own(tmp_path):
    check_node({"SLURM_TMPDIR": str(tmp_path)}, needs_gpus=False)
    (tmp_path / "file").touch()
    with pytest.raises(NodeError, match=r"n3: .*file/caduceus-\d+ cannot be written"):
        check_node({"SLURM_TMPDIR": str(tmp_path / "file"), "SLURMD_NODENAME": "n3"}, needs_gpus=False)


def test_a_node_that_lost_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    environment = {"SLURM_TMPDIR": str(tmp_path), "SLURMD_NODENAME": "n3", "CUDA_VISIBLE_DEVICES": "0,1"}
    check_node(environment, needs_gpus=False)
    with pytest.raises(NodeError, match="n3: torch sees 1 of the 2 GPUs 0,1"):
        check_node(environment, needs_gpus=True)


def torch_sees(monkeypatch, gpus: int) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)


@pytest.mark.parametrize(
    ("given", "sees"),
    [
        ("MIG-1,MIG-2", 1),  # CUDA shows a process one slice, whatever it is given
        ("MIG-GPU-1f/1/0,MIG-GPU-1f/2/0,MIG-GPU-2e/1/0", 1),
        ("GPU-1f,GPU-2e", 2),
        ("0,1,-1,3", 2),  # what follows on no GPU does not count
        ("NoDevFiles", 0),  # SLURM's word for none
        ("", 0),
    ],
)
def test_a_good_node_is_none_of_the_bad_ones(tmp_path, monkeypatch, given, sees):
    torch_sees(monkeypatch, sees)
    environment = {"SLURM_TMPDIR": str(tmp_path), "SLURMD_NODENAME": "n3", "CUDA_VISIBLE_DEVICES": given}
    check_node(environment, needs_gpus=True)


@pytest.mark.parametrize(("given", "sees", "of"), [("MIG-1,MIG-2", 0, 2), ("GPU-1f,GPU-2e", 1, 2), ("0,1,2,-1", 2, 3)])
def test_a_bad_node_is_still_found(tmp_path, monkeypatch, given, sees, of):
    torch_sees(monkeypatch, sees)
    environment = {"SLURM_TMPDIR": str(tmp_path), "SLURMD_NODENAME": "n3", "CUDA_VISIBLE_DEVICES": given}
    with pytest.raises(NodeError, match=f"n3: torch sees {sees} of the {of} GPUs"):
        check_node(environment, needs_gpus=True)


def test_each_process_of_a_node_has_its_own_slice_and_whole_gpus_stay_as_they_are():
    slices = {"CUDA_VISIBLE_DEVICES": "MIG-1,MIG-2"}
    assert [own_slice(slices, rank)["CUDA_VISIBLE_DEVICES"] for rank in (0, 1)] == ["MIG-1", "MIG-2"]
    assert own_slice({"CUDA_VISIBLE_DEVICES": "MIG-2"}, 1) == {"CUDA_VISIBLE_DEVICES": "MIG-2"}, "bound by SLURM"
    assert own_slice({"CUDA_VISIBLE_DEVICES": "0,1"}, 1) == own_slice({}, 0) == {}
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-1, MIG-2,none,3"}) == ["GPU-1", "MIG-2"]
