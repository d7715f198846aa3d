"""The published comparisons: every file, a small one from start to report, and the commands for a cluster."""

import json
import re
import shlex
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from caduceus.config import load_config
from caduceus.model.costs import parameter_count
from caduceus.run.directory import RunDirectory
from demo import paper
from demo.comparison import Outcome, report
from launch.sweep import sweep_configs
from tests.data.shard_fixture import Species, random_bases, tile, write_dataset

NAMES = sorted(path.stem for path in paper.CONFIGS.glob("*.yaml"))


@pytest.mark.moderate
@pytest.mark.parametrize("name", NAMES)
def test_arms_see_as_many_bases_at_both_scales(name: str) -> None:
    arms = paper.arms_of(name)
    small = [load_config(paper.CONFIG, arm.small) for arm in arms.values()]
    published = [load_config(arm.published[0], arm.published[1:]) for arm in arms.values()]
    for configs in (small, published):
        assert len({paper.bases_of_step(config) for config in configs}) == 1
    assert {paper.bases_of_step(config) * config.train.steps for config in published} == {10_000 << 20}
    if name == "tying":
        for configs in (small, published):
            tied, untied = (parameter_count(config.model) for config in configs)
            assert abs(untied / tied - 1) < 0.1


@pytest.mark.moderate
def test_the_published_scale_is_a_command_for_each_arm(tmp_path: Path) -> None:
    _, *lines = paper.published("tying", tmp_path, 3, [])
    for line, arm in zip(lines, ("tied", "untied"), strict=True):
        words = shlex.split(line)
        config, sweep = words[words.index("--config") + 1], words[words.index("--sweep") + 1]
        settings = [word for word in words[4:] if "=" in word and not word.startswith("train.seed")]
        folder, configs = sweep_configs(Path(config), settings, [sweep])
        assert [config.run.dir for config in configs] == [
            str(paper.directory(tmp_path, arm, seed)) for seed in range(3)
        ]
        assert folder == paper.directory(tmp_path, arm, 0).parent


@pytest.mark.slow
def test_a_comparison_from_shards_to_its_report(tmp_path: Path, monkeypatch, capsys) -> None:
    rng = np.random.default_rng(0)
    contigs = {"c": random_bases(rng, 4000), "v": random_bases(rng, 1000)}
    splits = {"train": tile("c", 4000, 1000), "valid": tile("v", 1000, 1000)}
    shards = write_dataset(tmp_path / "shards", [Species("s", contigs, splits)])
    out = tmp_path / "out"
    small = ["model.d_model=8", "model.n_layer=1", "data.seq_len=64", "data.workers=0", "valid.samples=8"]
    words = ["tying", "--budget", "0.001", "--seeds", "2", "--out", str(out), "--shards", str(shards), *small]
    monkeypatch.setattr("sys.argv", ["paper", *words])
    monkeypatch.setattr(paper, "PROBE_STEPS", 2)
    monkeypatch.setattr(paper, "LEAST_STEPS", 4)
    assert paper.main() == 0
    plan = json.loads((out / "plan.json").read_text())
    assert plan == {"tokens": paper.LEAST_STEPS * 4 * 64, "seeds": 2}
    losses = {}
    for arm in ("tied", "untied"):
        for seed in (0, 1):
            rows = RunDirectory.open(paper.directory(out, arm, seed)).metrics()
            assert rows[-1]["tokens"] == plan["tokens"] if "tokens" in rows[-1] else True
            losses[arm, seed] = [row["valid_loss"] for row in rows if "valid_loss" in row][-1]
    text = (out / "report.md").read_text()
    for (arm, seed), loss in losses.items():
        assert f"| {arm} | {seed} | {loss:.4f} |" in text
    assert len(set(losses.values())) == 4, "seeds and arms differ"
    mean = np.mean([losses["untied", seed] - losses["tied", seed] for seed in (0, 1)])
    assert f"{mean:+.4f}" in text
    assert matplotlib.image.imread(out / "curves.png").std() > 0.01
    before = {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")}
    capsys.readouterr()
    assert paper.main() == 0
    assert text.strip() in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("metrics.jsonl")} == before


def test_differences_are_by_seed_and_never_between_tasks() -> None:
    def outcome(arm: str, seed: int, loss: float, objective: str = "mlm") -> Outcome:
        return Outcome(arm, seed, 10, objective, [(1, 2.0), (2, loss)])

    outcomes = [outcome("a", 0, 1.0), outcome("a", 1, 1.5), outcome("b", 0, 1.1), outcome("b", 1, 1.4)]
    text = report("x", [*outcomes, outcome("c", 0, 1.2, "next_base"), outcome("c", 1, 1.2, "next_base")], 2)
    assert re.search(r"\| b \| 10 \| 1.2500 \| 0.2121 \| \+0.0000 ± 0.1414, above 0 in 1 of 2 \|", text)
    assert re.search(r"\| c \| 10 \| 1.2000 \| 0.0000 \| another task \|", text)
    assert text.count("\n| a |") == 3
