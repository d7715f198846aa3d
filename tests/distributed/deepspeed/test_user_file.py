"""A user's DeepSpeed file where it meets the documentation, the launcher and DeepSpeed's engine."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from caduceus.distributed.deepspeed.package import naming_its_file
from caduceus.distributed.deepspeed.user_file import ALLOWED
from caduceus.errors import NodeError, UserError
from tests.conftest import REPOSITORY
from tests.distributed.layouts import Layout, config_of, train_all


def test_the_page_on_parallelism_lists_every_key() -> None:
    page = (REPOSITORY / "docs" / "parallelism.md").read_text()
    zero = ALLOWED["zero_optimization"]
    sections = [ALLOWED, zero, zero["offload_optimizer"], zero["offload_param"]]
    keys = {key for section in sections for key, kind in section.items() if kind != {}}
    assert {key for key in keys if not re.search(rf"[`.]{key}`", page)} == set()
    listed = page[page.index("`parallel.deepspeed_config=FILE`") : page.index("A file that was written")]
    named = re.findall(r"`([a-z0-9_.]+)`", listed)
    assert {name.removeprefix("zero_optimization.") for name in named} <= keys | {"cpu", "none"}


@pytest.mark.moderate
def test_the_launcher_checks_a_file_without_torch_or_deepspeed() -> None:
    """It asks before it submits, from machines that have neither."""
    code = "import sys, caduceus.distributed.layout; assert not {'torch', 'deepspeed'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_on_the_engine_a_file_leaves_the_run_as_it_is_and_its_complaints_name_the_file(
    small_shards: Path, tmp_path: Path
) -> None:
    kept = {
        "_comment": "for two nodes",
        "amp": {"enabled": False},
        "communication_data_type": "fp32",
        "gradient_predivide_factor": 1.0,
        "flops_profiler": {"enabled": False},
        "steps_per_print": 1,
        "zero_optimization": {"offload_optimizer": None, "overlap_comm": True, "reduce_scatter": False},
    }
    # What DeepSpeed says of these only once it builds its optimizer, and the names in what it says.
    refused = {"allgather_bucket_size": (1, 33)}
    complaints = {"allgather_bucket_size": "allgather_bucket_size"}
    files = {"kept": (2, kept), "mistaken": (2, {"zero_optimization": {"overlap_com": True}})} | {
        key: (stage, {"zero_optimization": {key: value}}) for key, (stage, value) in refused.items()
    }
    configs = [config_of(Layout("", 2, {"strategy": "ddp"}), small_shards, tmp_path / "ddp", 2, steps=3)]
    for name, (stage, theirs) in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(theirs))
        parallel = {"strategy": "deepspeed", "zero_stage": stage, "deepspeed_config": str(tmp_path / f"{name}.json")}
        configs.append(config_of(Layout("", 2, parallel), small_shards, tmp_path / name, 2, steps=3))
    observed = dict(zip(("ddp", *files), train_all(2, configs), strict=True))
    refusals = {name: ranks[0].refusal for name, ranks in observed.items()}
    assert [rank.refusal for rank in observed["mistaken"]] == [refusals["mistaken"]] * 2
    assert "sets zero_optimization.overlap_com," in refusals["mistaken"] and not (tmp_path / "mistaken").exists()
    losses = {
        name: [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("ddp", "kept")
    }
    assert len(losses["ddp"]) == 3 and refusals["kept"] is None
    assert losses["kept"] == pytest.approx(losses["ddp"], rel=1e-5)  # fp32 sums in another order, over three steps
    for key, complaint in complaints.items():
        start = rf"parallel\.deepspeed_config: DeepSpeed does not start with \S+/{key}\.json: \w+: .*{complaint}"
        assert re.match(start, refusals[key]) and "\n" not in refusals[key]


def test_only_complaints_about_a_file_of_the_users_become_a_line() -> None:
    complaint = AssertionError("pre-scale\n  is not supported")
    line = r"ds\.json: AssertionError: pre-scale is not supported$"
    with pytest.raises(UserError, match=line) as refusal, naming_its_file("ds.json"):
        raise complaint
    assert refusal.value.__cause__ is complaint
    for path, error in ((None, complaint), ("ds.json", RuntimeError("out of memory")), ("ds.json", NodeError("node1"))):
        with pytest.raises(type(error)) as passed, naming_its_file(path):
            raise error
        assert passed.value is error
