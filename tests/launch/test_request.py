import pytest

from caduceus.errors import UserError
from launch.capacity import slurm_complaint
from launch.request import PRESETS, load_request, parse_time, sbatch_parameters
from launch.scheduler import Nodes


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("10:30", 11),
        ("01:00:00", 60),
        ("24:00:00", 1440),
        ("2-0", 2880),
        ("1-12:30", 2190),
        ("1-00:00:01", 1441),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text, minutes):
    assert parse_time(text) == minutes


@pytest.mark.parametrize("text", ["", "a day", "1:2:3:4", "-5", "2h"])
def test_other_time_limits_are_refused(text):
    with pytest.raises(UserError, match="is not a time limit"):
        parse_time(text)


def test_every_preset_loads():
    names = {path.stem for path in PRESETS.glob("*.yaml")}
    assert names >= {"slurm", "h100x8", "cpu", "local", "debug"}
    for name in names:
        assert load_request(name, {}).world >= 1


def test_options_win_over_the_preset_and_mappings_add_up(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("nodes: 2\ngpus_per_node: 4\nenv: {A: '1', B: '2'}\nsbatch: {exclusive: true}\n")
    request = load_request(str(path), {"nodes": 3, "env": {"B": "3"}, "sbatch": {"mail-type": "END"}})
    assert (request.nodes, request.gpus_per_node, request.world) == (3, 4, 12)
    assert request.env == {"A": "1", "B": "3"}
    assert request.sbatch == {"exclusive": True, "mail-type": "END"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nods: 2", r"nods: .*known keys: .*nodes"),
        ("nodes: many", r"nodes: .*many"),
        ("nodes: 0", "nodes: must be at least 1, got 0"),
        ("time: 24:00:00", "write it in quotes"),
        ("- nodes", "a preset is a mapping"),
        ("nodes: [", "not readable as YAML"),
        ("executor: pbs", "executor: choose one of slurm, local, debug; got 'pbs'"),
        ("gpu_request: gpus", "gpu_request: choose"),
        ("gpus_per_node: 2\ntasks_per_node: 3", "3 processes cannot share a node's 2 GPUs"),
        ("executor: local\nnodes: 2", "use --tasks-per-node"),
        ("executor: debug\ntasks_per_node: 2", "debug runs in this one process"),
        ("time: '2'\nsignal_seconds: 120", "nothing is left"),
    ],
)
def test_a_wrong_preset_is_one_clear_line(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_request(str(path), {})
    assert "\n" not in str(error.value)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(UserError, match="choose cpu, debug, h100x8, local, slurm"):
        load_request("h200x8", {})


@pytest.mark.parametrize(
    ("request_form", "kind", "key", "value"),
    [
        ("gpus-per-node", None, "gpus-per-node", "8"),
        ("gpus-per-node", "h100", "gpus-per-node", "h100:8"),
        ("gres", None, "gres", "gpu:8"),
        ("gres", "h100", "gres", "gpu:h100:8"),
    ],
)
def test_gpus_are_asked_for_in_the_cluster_s_form(request_form, kind, key, value):
    request = load_request("slurm", {"gpus_per_node": 8, "gpu_request": request_form, "gpu_type": kind})
    assert sbatch_parameters(request, "run")["additional_parameters"][key] == value
    request = load_request("slurm", {"gpus_per_node": 8, "gpu_request": "none"})
    assert not {"gres", "gpus-per-node"} & set(sbatch_parameters(request, "run")["additional_parameters"])


def test_values_of_the_environment_are_quoted_for_the_shell():
    request = load_request("cpu", {"env": {"NAME": "a b; c"}, "cpus_per_task": None})
    assert sbatch_parameters(request, "run")["setup"] == ["export NAME='a b; c'"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"time": "1-0"}, None),
        ({"time": "2-0"}, "time: 2-0 asked for, but the partition's limit is 1-00:00:00"),
        ({"time": "2-0", "partition": "long"}, None),
        ({"time": "2-0", "partition": "main,long"}, None),
        ({"time": "45", "partition": "short"}, "time: 45 asked for, but the partition's limit is 30:00"),
        ({"time": "2-0", "qos": "week"}, None),
        ({"partition": "gpu"}, "partition: no partition 'gpu' here; choose one of long, main, short"),
    ],
)
def test_a_job_that_no_partition_of_its_own_would_run(fake_slurm, options, complaint):
    rows = [("main*", "(null)", "1-00:00:00"), ("main*", "gpu:2", "1-00:00:00")]
    rows += [("long", "(null)", "infinite"), ("short", "(null)", "30:00")]
    rows = [f"{name}|up|idle|4|64|250000|{gres}|{limit}" for name, gres, limit in rows]
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
