"""The command line: what it prints without submitting, and what it refuses."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from caduceus.config import load_config
from caduceus.errors import UserError
from launch.submission import REPOSITORY

GOLDEN = Path(__file__).parent / "h100x8_64_nodes.sh"


def test_dry_run_of_64_nodes_of_8_gpus(launch, capsys, tmp_path):
    config = str(REPOSITORY / "configs" / "pretrain" / "ph-131k.yaml")
    request = ["--nodes", "64", "--cluster", "h100x8", "--partition", "gpu", "--account", "lab", "--qos", "long"]
    request += ["--constraint", "ib", "--exclude", "bad[1-2]", "--reservation", "week", "--sbatch", "mail-type=END"]
    request += ["--setup", "module load cuda", "--srun=--container-image=caduceus.sqsh", "--env", "NCCL_DEBUG=WARN"]
    assert launch("--dry-run", "--config", config, *request, "parallel.context=8", "train.global_batch=64") == 0
    printed = capsys.readouterr()
    script, _, resolved = printed.out.partition("# runs/ph-131k/config.yaml\n")
    script = script.replace(str(tmp_path), "/home/lab").replace(sys.executable, "python")
    assert script == GOLDEN.read_text()
    (tmp_path / "resolved.yaml").write_text(resolved)
    assert load_config(tmp_path / "resolved.yaml").parallel.context == 8
    assert "would be refused: there is no SLURM on this machine" in printed.err
    assert "would be refused: shards/hg38: no complete shard dataset here" in printed.err
    assert not (tmp_path / "runs").exists(), "a dry run leaves nothing behind"


def test_the_first_command_of_the_readme(launch, capsys, monkeypatch):
    readme = (REPOSITORY / "README.md").read_text()
    command = re.search(r"\$ python launch/slurm\.py (--nodes.*?)\n\$", readme, re.DOTALL)
    monkeypatch.chdir(REPOSITORY)
    assert launch("--dry-run", *shlex.split(command[1].replace("\\\n", " "))) == 0
    assert (
        "64 ranks, 8 to a sequence (parallel.strands=2 parallel.context=4), with 1 sequence a step"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "sharing"),
    [
        ([], "64 ranks, 8 to a sequence (parallel.strands=2 parallel.context=4), with 1 sequence a step, 32,768 bases"),
        (["train.global_batch=32"], "64 ranks, 2 to a sequence (parallel.strands=2 parallel.context=1), with 1 seq"),
        (["train.global_batch=32", "parallel.strands=1"], "2 to a sequence (parallel.strands=1 parallel.context=2)"),
        (["parallel.context=16"], "64 ranks, 16 to a sequence (parallel.strands=1 parallel.context=16), with 2 seq"),
        (["model.rcps=false"], "(parallel.strands=1 parallel.context=8)"),
        (["model.rcps=false", "train.global_batch=16"], "(parallel.strands=1 parallel.context=4)"),
        (["model.rcps=false", "train.micro_batch=2"], "(parallel.strands=1 parallel.context=16)"),
        (["train.global_batch=128"], "64 ranks with 2 sequences a step, 131,072 bases"),
    ],
)
def test_more_ranks_than_sequences_share_them(launch, capsys, arguments, sharing):
    assert launch("--nodes", "8", "--cluster", "h100x8", "--dry-run", *arguments) == 0
    assert sharing in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "way_on"),
    [
        (["parallel.context=1"], r"parallel\.strands=2 parallel\.context=4 fits"),
        (["parallel.context=2", "parallel.strands=1"], r"parallel\.strands=2 parallel\.context=4 fits"),
        (["data.seq_len=131071"], r"no parallel\.context fits: change the number of ranks or train\.micro_batch"),
    ],
)
def test_ranks_without_a_part_are_refused_with_a_way_on(launch, arguments, way_on):
    with pytest.raises(UserError, match=rf"global_batch: \d+ is not a multiple .*; {way_on}$"):
        launch("--nodes", "8", "--cluster", "h100x8", "--dry-run", *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no SLURM on this machine .*--cluster local"),
        (["--cluster", "local", "data.path=nowhere"], "nowhere: no complete shard dataset here"),
        (["--cluster", "local", "--tasks-per-node", "3"], "global_batch: 8 is not a multiple"),
        (["--cluster", "local", "--tasks-per-node", "4", "parallel.context=3"], "parallel.context: 3 does not divide"),
        (["--cluster", "local", "--tasks-per-node", "3", "parallel.strands=2"], "strands: 2 x .* divide .*, 3$"),
        (["parallel.strands=2", "model.rcps=false"], "parallel.strands: 2 needs model.rcps=true"),
        (["parallel.strands=3"], "parallel.strands: choose one of 0, 1, 2; got '3'"),
        (["--cluster", "local", "--setup", "module load cuda"], "a local job has this shell's environment"),
        (["--cluster", "cpu", "run.device=cuda"], "the job asks for no GPUs"),
        (["--cluster", "cpu", "--env", "NAME"], "--env NAME: expected NAME=VALUE"),
        (["train.steps"], "expected an override of the form"),
    ],
)
def test_wrong_use_is_one_line_and_leaves_no_run(launch, small_config, tmp_path, arguments, message):
    if "local" not in arguments:
        arguments = ["--cluster", "cpu", *arguments]
    with pytest.raises(UserError, match=message) as error:
        launch("--config", small_config, *arguments)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "runs" / "small" / "submissions.json").exists()


def test_a_local_job_gets_no_other_gpus_than_this_shell(launch, small_config, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,MIG-1")
    preset = tmp_path / "four.yaml"
    preset.write_text("executor: local\ngpus_per_node: 4\ntime: '0'\n")
    with pytest.raises(UserError, match="gpus_per_node: 4 asked for, but CUDA_VISIBLE_DEVICES gives this shell 2"):
        launch("--config", small_config, "--cluster", str(preset), "run.dir=run")
    assert not (tmp_path / "run").exists()


def test_the_estimate_of_a_million_bases_on_512_gpus(launch, capsys):
    config = str(REPOSITORY / "configs" / "pretrain" / "ph-1m.yaml")
    layout = ["parallel.context=8", "train.global_batch=64"]
    assert launch("--dry-run", "--config", config, "--nodes", "64", "--cluster", "h100x8", *layout) == 0
    estimate = capsys.readouterr().out.splitlines()[0]
    assert "512 ranks, 8 to a sequence (parallel.strands=1 parallel.context=8), with 1 sequence a step" in estimate
    assert "131,072 bases at a time each; 7.73M parameters" in estimate
    # 131,072 bases of 0.65 us; 256 channels and 16 layers of 35.8 bytes for each: all blocks fit, none is recomputed.
    assert estimate.endswith("unmeasured estimate for H100: 0.12 s a step, 21.5 GB")


@pytest.mark.moderate
@pytest.mark.parametrize(("millions", "nodes"), [(1, 2), (2, 4), (4, 8), (8, 16)])
def test_the_estimate_of_longer_contexts_on_more_gpus(launch, capsys, millions, nodes):
    config = str(REPOSITORY / "configs" / "pretrain" / "ps-1m.yaml")
    layout = [f"data.seq_len={millions * 2**20}", "parallel.strands=2", f"parallel.context={8 * millions}"]
    assert launch("--dry-run", "--config", config, "--nodes", str(nodes), "--cluster", "h100x8", *layout) == 0
    estimate = capsys.readouterr().out.splitlines()[0]
    shared = f"{8 * nodes} ranks, {16 * millions} to a sequence ({' '.join(layout[1:])}), with 1 sequence a step"
    assert f"{shared}, 131,072 bases at a time each; 7.73M parameters" in estimate
    assert estimate.endswith("unmeasured estimate for H100: 0.12 s a step, 21.5 GB")
    layout[-1] = f"parallel.context={16 * millions}"
    with pytest.raises(UserError, match=r"strands: 2 x .* ranks share a sequence, which does not divide"):
        launch("--dry-run", "--config", config, "--nodes", str(nodes), "--cluster", "h100x8", *layout)


@pytest.mark.moderate
def test_commands_do_not_wait_for_torch():
    check = "import sys, launch.runs, launch.slurm; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY).returncode == 0


def test_a_time_limit_shorter_than_a_checkpoint_interval(launch, small_config, tmp_path):
    run = tmp_path / "runs" / "small"
    run.mkdir(parents=True)
    rows = [json.dumps({"step": step, "seconds": 100.0}) for step in (1, 2)]
    (run / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    too_short = ["--config", small_config, "--cluster", "local", "--time", "5"]
    with pytest.raises(UserError, match=r"5 min, less 120 s .* interval of 3\.3 min \(2 steps of 1e\+02 s\)"):
        launch(*too_short)
    with pytest.raises(UserError, match="holds something other than a run"):  # the time of 6 minutes is long enough
        launch(*too_short[:-1], "6")


@pytest.mark.slow
def test_local_and_debug_give_the_same_run_and_refuse_another_configuration(launch, small_config, tmp_path, capfd):
    def losses(name: str) -> list[float]:
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(row)["loss"] for row in rows]

    request = ["--config", small_config, "--cluster"]
    assert launch(*request, "debug", "run.dir=debug") == 0
    assert launch(*request, "local", "--tasks-per-node", "2", "run.dir=local") == 0
    output = capfd.readouterr().out
    assert "run directory: local" in output and "step 4/4" in output, "the job's log is shown"
    # fp32: sums over ranks in another order differ in the last bits.
    assert losses("local") == pytest.approx(losses("debug"), rel=1e-6)
    with pytest.raises(UserError, match=r"holds a run with train\.lr=0\.008, not 0\.001"):
        launch(*request, "local", "run.dir=local", "train.lr=1e-3")
    submission = json.loads((tmp_path / "local" / "submissions.json").read_text())[0]
    assert submission["executor"] == "local" and submission["git_commit"]
    assert (tmp_path / "local" / "code" / "caduceus" / "config" / "run.py").exists()
    started = json.loads((tmp_path / "local" / "provenance.json").read_text())["starts"][0]
    for key in ("git_commit", "git_diff"):  # of what was submitted, whatever the repository holds by now
        assert started[key] == submission[key]
