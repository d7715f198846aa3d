import argparse
import math

import pytest

from caduceus.errors import UserError
from launch.check import step_options
from launch.request import (
    AS_IN_SBATCH,
    PRESETS,
    add_request_options,
    load_request,
    parse_time,
    requested_job,
    sbatch_parameters,
)


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
        ("0", math.inf),  # no limit, as SLURM has it
        ("00:00:00", math.inf),
        ("0-0", math.inf),
        ("UNLIMITED", math.inf),
        ("infinite", math.inf),
        ("0:01", 1),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(text, minutes):
    assert parse_time(text) == minutes


@pytest.mark.parametrize("text", ["", "a day", "1:2:3:4", "-5", "2h", "1:-5", "٣", "1_0"])
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
        ("spare: -1", "spare: must be at least 0, got -1"),
        ("executor: local\nspare: 1", "spare: only a SLURM job can have spare nodes, but the executor is local"),
        ("sbatch: {no-kill: true}", "sbatch: no-kill: is set by --spare"),
        ("executor: debug\ntasks_per_node: 2", "debug runs in this process alone"),
        ("time: '2'\nsignal_seconds: 120", "leave no time"),
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


def script_keys(request) -> dict:
    """What the batch script gets of memory, CPUs and generic resources."""
    parameters = sbatch_parameters(request, "run")
    every = parameters | parameters["additional_parameters"]
    names = ("mem", "mem-per-gpu", "mem-per-cpu", "cpus_per_task", "cpus-per-gpu", "gres")
    return {name: every[name] for name in names if name in every}


@pytest.fixture
def preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("gpus_per_node: 2\nmem: 100G\ncpus_per_task: 4\nsbatch: {exclusive: true}\n")
    return str(path)


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, {"mem": "100G", "cpus_per_task": 4}),
        ({"sbatch": {"mem-per-gpu": "40G"}}, {"mem-per-gpu": "40G", "cpus_per_task": 4}),
        ({"sbatch": {"mem_per_cpu": "4G"}}, {"mem-per-cpu": "4G", "cpus_per_task": 4}),
        ({"sbatch": {"cpus-per-gpu": "8"}}, {"mem": "100G", "cpus-per-gpu": "8"}),
        ({"sbatch": {"exclusive": None, "gres": "nvme:1"}}, {"mem": "100G", "cpus_per_task": 4, "gres": "nvme:1"}),
        (
            {"gpu_request": "gres", "sbatch": {"gres": "nvme:1"}},
            {"mem": "100G", "cpus_per_task": 4, "gres": "gpu:2,nvme:1"},
        ),
    ],
)
def test_an_option_takes_the_place_of_what_the_preset_asks_for_in_another_form(preset, options, keys):
    assert script_keys(load_request(preset, options)) == keys


def test_an_option_of_the_command_line_wins_over_the_other_form_in_the_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("sbatch: {mem-per-gpu: 40G, cpus-per-gpu: 8}\n")
    assert script_keys(load_request(str(path), {"mem": "7G"})) == {"mem": "7G", "cpus-per-gpu": 8}
    assert script_keys(load_request(str(path), {"cpus_per_task": 2})) == {"mem-per-gpu": "40G", "cpus_per_task": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mem": "1G", "sbatch": {"mem-per-gpu": "2G"}}, "sbatch: mem and mem-per-gpu exclude each other"),
        ({"sbatch": {"mem-per-cpu": "1G", "mem-per-gpu": "2G"}}, "mem-per-cpu and mem-per-gpu exclude each other"),
        ({"sbatch": {"partition": "gpu"}}, "sbatch: partition: is set by --partition"),
        ({"sbatch": {"time": "10"}}, "sbatch: time: is set by --time"),
        ({"sbatch": {"ntasks_per_node": "4"}}, "ntasks-per-node: is set by --nodes and --tasks-per-node"),
        ({"sbatch": {"output": "x"}}, "sbatch: output: is set by run.dir"),
        ({"sbatch": {"clusters": "green"}}, "SLURM_CLUSTERS"),
        ({"sbatch": {"gpus": "4"}}, "sbatch: gpus: request GPUs by gpus_per_node"),
        ({"sbatch": {"gres": "gpu:4"}}, "sbatch: gres: request GPUs by gpus_per_node"),
        ({"chain": 2, "sbatch": {"dependency": "afterok:1"}}, "submit without --chain"),
    ],
)
def test_what_sbatch_would_be_told_twice_is_refused(preset, options, message):
    with pytest.raises(UserError, match=message) as error:
        load_request(preset, options)
    assert "\n" not in str(error.value)


def test_spare_nodes_are_asked_for_and_left_idle():
    parameters = sbatch_parameters(load_request("h100x8", {"nodes": 4, "spare": 2}), "name")
    assert parameters["nodes"] == 6 and parameters["additional_parameters"]["no-kill"] is True
    assert parameters["srun_args"][:3] == ["--kill-on-bad-exit=1", "--nodes=4", "--ntasks=32"]
    parameters = sbatch_parameters(load_request("h100x8", {"nodes": 4}), "name")
    assert "no-kill" not in parameters["additional_parameters"] and "--nodes=4" not in parameters["srun_args"]


def test_no_time_limit_is_sbatch_s_zero():
    assert sbatch_parameters(load_request("cpu", {"time": "0"}), "run")["time"] == 0


@pytest.mark.parametrize("name", AS_IN_SBATCH)
def test_what_sbatch_and_srun_call_alike_is_said_once(name: str) -> None:
    parser = argparse.ArgumentParser()
    add_request_options(parser, "slurm")
    request = requested_job(parser.parse_args([f"--{name}", "it"]))
    assert sbatch_parameters(request, "job")["additional_parameters"][name] == "it"
    assert f"--{name}=it" in step_options(request)
    with pytest.raises(UserError, match=f"sbatch: {name}: is set by --{name}"):
        load_request("slurm", {"sbatch": {name: "it"}})


def test_every_option_of_a_job_says_what_it_is() -> None:
    parser = argparse.ArgumentParser()
    add_request_options(parser, default="slurm")
    assert [action.dest for action in parser._actions if not action.help] == []
