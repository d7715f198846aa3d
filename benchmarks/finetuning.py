"""What pre-training is worth on small labelled tasks, beside a random start, a CNN and logistic regression on k-mers.

python benchmarks/finetuning.py --benchmarks DIR --genomes FASTA … --fly FASTA --mavenn DIR --work DIR [--steps 800]

--benchmarks has gue_TASK/train.csv.gz, dev and test, and genomic_benchmarks/drosophila_enhancers_stark. --genomes are
the genomes on which one small model is pre-trained. --fly is chromosome 4 of dm6. --mavenn is the folder
mavenn/examples/datasets of the PyPI package mavenn. --work keeps everything; after a kill the same command goes on.
"""

import argparse
import csv
import gzip
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.machine import processor
from caduceus.evaluate.columns import mean_and_spread, read_columns, write_columns
from caduceus.evaluate.finetune import FinetuneOptions, finetune
from caduceus.evaluate.fitting import FitOptions
from caduceus.evaluate.labelled import LabelledTable
from caduceus.evaluate.model import Runner
from caduceus.evaluate.suite_data import find_task_data

SIZES = {"train": 400, "valid": 100, "test": 400}
FLY_BASES = 300
"""Of the middle of an enhancer, which has about 2,000."""
METHODS = {"full": "pre-trained", "random": "random start", "probe": "linear probe", "cnn": "CNN", "kmer": "5-mers"}
MODEL = ["model.d_model=64", "model.n_layer=2", "model.rcps=true"]


def pretrain(genomes: list[Path], work: Path, steps: int) -> Path:
    """A small Caduceus-PS after `steps` steps of 16 x 512 bases, the genomes drawn equally."""
    run = work / "run"
    shards = []
    for genome in genomes:
        name = genome.name.split(".")[0]
        shards.append(work / "shards" / name)
        if not (shards[-1] / "manifest.json").is_file():
            command = ["data_prep/shard_genome.py", "--fasta", genome, "--species", name, "--out", shards[-1]]
            subprocess.run([sys.executable, *map(str, command), "--strands", "forward", "--workers", "1"], check=True)
    paths = "[" + ",".join(f"{{path: {path}, weight: 1}}" for path in shards) + "]"
    settings = [f"train.steps={steps}", "train.lr=4e-3", "train.global_batch=16", "train.micro_batch=16"]
    settings += ["data.seq_len=512", "data.workers=0", "valid.every=0", "checkpoint.every=100"]
    settings += ["wandb.mode=disabled", "monitor.report=false"]
    command = ["-m", "caduceus.train", "--config", "demo", *MODEL, *settings, f"data.path={paths}", f"run.dir={run}"]
    subprocess.run([sys.executable, *command], check=True)
    return run


def subset(source: LabelledTable, target: Path, count: int, seed: int) -> LabelledTable:
    """`count` rows drawn by the seed, all where there are fewer."""
    columns = read_columns(source.path)
    rows = np.sort(np.random.default_rng(seed).permutation(len(columns))[:count])
    target.parent.mkdir(parents=True, exist_ok=True)
    write_columns(target, {name: [columns.values[name][row] for row in rows] for name in ("sequence", "label")})
    return LabelledTable(target)


def middle(source: LabelledTable, target: Path, bases: int) -> LabelledTable:
    """The same with the middle of each sequence."""
    columns = read_columns(source.path).values
    starts = [max(0, len(text) - bases) // 2 for text in columns["sequence"]]
    cut = [text[start : start + bases] for text, start in zip(columns["sequence"], starts, strict=True)]
    write_columns(target, {"sequence": cut, "label": columns["label"]})
    return LabelledTable(target)


def gue(folder: Path, task: str, work: Path) -> dict[str, LabelledTable]:
    """A GUE task, drawn down to `SIZES`."""
    found = find_task_data(folder, [task], work / "converted" / task, None).tables
    return {split: subset(found[split], work / f"{task}-{split}.csv", SIZES[split], 0) for split in SIZES}


def fly_enhancers(folder: Path, genome: Path, work: Path) -> dict[str, LabelledTable]:
    """The rows on chromosome 4, whose contig has another name in the file."""
    renamed = work / "fly4.fa"
    lines = gzip.decompress(genome.read_bytes()).decode().split("\n")
    renamed.write_text("\n".join([">chr4", *lines[1:]]))
    found = find_task_data(folder, ["drosophila_enhancers_stark"], work / "converted" / "fly", renamed)
    return {split: middle(table, work / f"fly-{split}.csv", FLY_BASES) for split, table in found.tables.items()}


def mavenn(folder: Path, name: str, work: Path) -> dict[str, LabelledTable]:
    """mpsa: measured inclusion of splice sites; sortseq: the mean bin of promoter variants."""
    with gzip.open(folder / f"{name}_data.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    if name == "sortseq":
        for row in rows:
            counts = np.array([int(row[f"ct_{bin_}"]) for bin_ in range(10)])
            row["y"] = counts @ np.arange(10) / counts.sum()
    tables = {}
    for split, word in (("train", "training"), ("valid", "validation"), ("test", "test")):
        chosen = [row for row in rows if row["set"] == word]
        whole = work / "converted" / f"{name}-{split}.csv"
        whole.parent.mkdir(parents=True, exist_ok=True)
        columns = {"sequence": [row["x"] for row in chosen], "label": [float(row["y"]) for row in chosen]}
        write_columns(whole, columns)
        tables[split] = subset(LabelledTable(whole), work / f"{name}-{split}.csv", SIZES[split], 0)
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--benchmarks", type=Path, required=True)
    parser.add_argument("--genomes", type=Path, nargs="+", required=True)
    parser.add_argument("--fly", type=Path, required=True)
    parser.add_argument("--mavenn", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    work = arguments.work
    runner = Runner(pretrain(arguments.genomes, work, arguments.steps), "cpu")
    tasks = {
        "mpsa, 9 bases": mavenn(arguments.mavenn, "mpsa", work),
        "prom_core_tata, 70 bases": gue(arguments.benchmarks, "gue_prom_prom_core_tata", work),
        "fly enhancers, 300 bases": fly_enhancers(arguments.benchmarks / "genomic_benchmarks", arguments.fly, work),
        "sortseq, 75 bases": mavenn(arguments.mavenn, "sortseq", work),
        "tf_0, 101 bases": gue(arguments.benchmarks, "gue_tf_0", work),
        "prom_300_tata, 300 bases": gue(arguments.benchmarks, "gue_prom_prom_300_tata", work),
    }
    heads = ["task", "train, test", "metric", *METHODS.values()]
    print(f"{processor()}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name, tables in tasks.items():
        few = "fly" in name
        fit = FitOptions(epochs=arguments.epochs, lr=2e-3, batch_size=8 if few else 16)
        options = FinetuneOptions(
            probe=True, baselines=("random", "cnn", "kmer"), seeds=3, valid_share=0.25 if few else 0.1, fit=fit
        )
        result = finetune(runner, tables, work / name.split(",")[0].replace(" ", "-"), options, lambda line: None)
        sizes = [len(read_columns(tables[split].path)) for split in ("train", "test")]
        metric = "auroc" if few else result["metric"]
        cells = [mean_and_spread(result["summary"][method][metric], 3) for method in METHODS]
        print(f"| {name} | {sizes[0]}, {sizes[1]} | {metric} | {' | '.join(cells)} |", flush=True)
    print(f"\n{time.process_time():.0f} s of processor time here, besides the pre-training")


if __name__ == "__main__":
    main()
