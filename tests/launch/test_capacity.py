"""What partitions have for a request, nodes that are away included."""

import pytest

from caduceus.errors import UserError
from caduceus.run.directory import RunDirectory
from launch.capacity import slurm_complaint, waiting_note
from launch.history import submissions
from launch.request import load_request
from launch.scheduler import Nodes

REFUSAL = "echo 'allocation failure: Requested node configuration is not available' >&2; exit 1"
TESTS_FAIL = f'case "$*" in *--test-only*) {REFUSAL};; esac; echo "Submitted batch job 7"'


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"time": "1-0"}, None),
        ({"time": "2-0"}, "time: 2-0 asked for, but the partition's limit is 1-00:00:00"),
        ({"time": "0"}, "time: no limit asked for, but the partition's limit is 1-00:00:00"),
        ({"time": "0", "partition": "long"}, None),
        ({"time": "2-0", "partition": "long"}, None),
        ({"time": "2-0", "partition": "main,long"}, None),
        ({"time": "45", "partition": "short"}, "time: 45 asked for, but the partition's limit is 30:00"),
        ({"time": "2-0", "qos": "week"}, None),
        ({"partition": "gpu"}, "partition: there is no partition 'gpu' here; choose one of long, main, short"),
        ({"nodes": 2}, None),
        ({"nodes": 3}, "nodes: 3 asked for, but a partition has at most 2"),
        ({"nodes": 2, "partition": "long,short"}, "nodes: 2 asked for, but a partition has at most 1"),
    ],
)
def test_a_job_that_no_partition_of_its_own_would_run(fake_slurm, options, complaint):
    rows = [("main*", "(null)", "1-00:00:00"), ("main*", "gpu:2", "1-00:00:00")]
    rows += [("long", "(null)", "infinite"), ("short", "(null)", "30:00")]
    rows = [f"{name}|up|idle|1|4|250000|{gres}|{limit}" for name, gres, limit in rows]
    fake_slurm.answer("sinfo", "\n".join(f"echo '{row}'" for row in rows))
    assert slurm_complaint(load_request("cpu", options)) == complaint


def gpus(gres: str, kind: str | None = None) -> int:
    return Nodes("main", True, True, "idle", 1, 64, 250_000, gres, "infinite").gpus(kind)


def test_gpus_are_counted_in_what_sinfo_prints():
    assert gpus("gpu:h100:8(S:0-1)") == 8
    assert gpus("gpu:a100:2(S:0),gpu:h100:4,nvme:1", "h100") == 4
    assert gpus("gpu:a100:2(S:0),gpu:h100:4") == 6
    assert gpus("(null)") == 0
    assert gpus("shard:4") == 0


AWAY = ("drained", "down*", "draining", "maint", "idle*", "reserved")


@pytest.mark.parametrize(
    ("rows", "options", "waits_for"),
    [
        *(([f"main*|up|{state}|4|16|64000|gpu:8|infinite"], {}, state) for state in AWAY),
        (["main*|down|idle|4|16|64000|gpu:8|infinite"], {}, "in a partition that is down"),
        (["main*|up|idle|1|16|64000|-|infinite", "main*|up|down|3|16|64000|-|infinite"], {"nodes": 2}, "down"),
        (["main*|up|idle|4|2|64000|-|infinite", "main*|up|down|1|16|64000|-|infinite"], {}, "down"),
        (["main*|up|idle|4|16|64000|gpu:8|infinite"], {}, None),  # enough of them: it is something else
        (["main*|up|drained|4|16|64000|gpu:8|infinite"], {"mem": "1T"}, None),  # not even when they are back
        (["main*|up|drained|4|16|64000|gpu:8|infinite"], {"cpus_per_task": 17}, None),
        (["main*|up|drained|4|16|64000|gpu:8|infinite", "other|up|idle|4|16|64000|gpu:8|infinite"], {}, "drained"),
    ],
)
def test_a_request_that_waits_for_nodes_is_told_from_one_that_can_never_run(fake_slurm, rows, options, waits_for):
    fake_slurm.answer("sinfo", "\n".join(f"echo '{row}'" for row in rows))
    note = waiting_note(load_request("cpu", options))
    assert note == (waits_for and f"the job will wait, as nodes that it needs are {waits_for} now")


@pytest.mark.moderate
@pytest.mark.parametrize("state", ["drained", "down"])
def test_where_all_nodes_are_away_the_job_is_queued_with_a_note(launch, fake_slurm, small_config, capsys, state):
    fake_slurm.answer("sinfo", f"echo 'main*|up|{state}|4|64|250000|(null)|infinite'")
    fake_slurm.answer("sbatch", TESTS_FAIL)
    assert launch("--config", small_config, "--cluster", "cpu", "run.dir=run") == 0
    assert f"note:          the job will wait, as nodes that it needs are {state} now" in capsys.readouterr().out
    assert submissions(RunDirectory("run"))[0].jobs == ["7"]


def test_what_no_node_could_ever_run_is_refused_while_all_are_away(launch, fake_slurm, small_config, tmp_path):
    fake_slurm.answer("sinfo", "echo 'main*|up|drained|4|64|250000|(null)|infinite'")
    fake_slurm.answer("sbatch", TESTS_FAIL)
    with pytest.raises(UserError, match="SLURM refuses the job: Requested node configuration is not available"):
        launch("--config", small_config, "--cluster", "cpu", "--mem", "1T", "run.dir=run")
    assert not fake_slurm.asked("sbatch") and not (tmp_path / "run").exists()
