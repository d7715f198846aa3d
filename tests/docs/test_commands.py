"""Every command of README and docs does what the page says, run from the page's own text."""

import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests import preloaded
from tests.conftest import REPOSITORY, write_random_fasta
from tests.docs.pages import NEEDS, Block, blocks

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
CODE = ("data_prep", "launch", "configs", "demo", "tests", "benchmarks")
SMALL = [
    *("model.d_model=16", "model.n_layer=1", "data.seq_len=256", "data.workers=0", "valid.samples=2", "run.device=cpu"),
    *("train.steps=2", "train.global_batch=2", "train.micro_batch=1", "train.precision=fp32"),
]
"""What a training of a page gets on top, to be over in seconds."""
SHELL = re.compile(r"[|&;<>$`*?~]")
"""What only a shell understands."""
TRAINS = ("-m caduceus.train", "caduceus-train", "launch/slurm.py --cluster local")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a checkout of a user who has genomes of a mouse and of a yeast."""
    for name in CODE:
        (tmp_path / name).symlink_to(REPOSITORY / name)
    write_random_fasta(tmp_path / "genome.fa", 1, {"chr1": 30_000, "chr2": 9_000, "chr19": 10_000})
    subprocess.run(["gzip", "--keep", "genome.fa"], cwd=tmp_path, check=True)
    (tmp_path / "regions.bed").write_text("chr1\t0\t20000\ttrain\nchr19\t0\t8000\tvalid\n")
    labelled = [f"{'ACGT' * 8}{'GC' * n},{n % 2}" for n in range(12)]
    (tmp_path / "labelled.csv").write_text("\n".join(["sequence,label", *labelled]))
    (tmp_path / "benchmarks-data" / "tf" / "0").mkdir(parents=True)
    for split in ("train", "dev", "test"):
        (tmp_path / "benchmarks-data" / "tf" / "0" / f"{split}.csv").symlink_to(tmp_path / "labelled.csv")
    (tmp_path / "places.bed").write_text("chr2\t500\t504\n")
    bases = (tmp_path / "genome.fa").read_text().split("\n")[9]  # the ninth line of chr1
    row = "\t".join(["chr1", "481", ".", bases[0].upper(), "AC" if bases[0] in "Gg" else "GA"])
    head = "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"
    other = row.replace("481", "482").replace(f"\t{bases[0].upper()}\t", f"\t{bases[1].upper()}\t")
    labels = [f"{row}\t.\t.\tCLNSIG=Pathogenic", f"{other}\t.\t.\tCLNSIG=Benign"]
    (tmp_path / "variants.vcf").write_text("\n".join(["##fileformat=VCFv4.2", head, *labels, ""]))
    (tmp_path / "variants.tsv").write_text(f"chrom\tpos\tid\tref\talt\n{row}\n")
    return tmp_path


def shortened(command: str) -> str:
    trains = any(words in command for words in TRAINS) and "--show" not in command
    return " ".join([command, *SMALL]) if trains else command


def run(command: list[str] | str, where: Path, block: Block) -> None:
    """README's own in fresh processes, other pages' from one that has imported what they import."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{sysconfig.get_path('scripts')}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "offline",
    }
    if isinstance(command, str) and not SHELL.search(command):
        command = shlex.split(command)
    options = {"cwd": where, "env": environment, "capture_output": True, "text": True}
    if block.page.name != "README.md" and command[0] == "python":
        done = preloaded.run([sys.executable, *command[1:]], **options)
    else:
        done = subprocess.run(command, shell=isinstance(command, str), **options)
    assert done.returncode == 0, (
        f"{block.page.name}:{block.line}: {command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_run(page: Path, checkout: Path) -> None:
    for block in blocks(page):
        if block.needs is not None:
            continue
        if block.language == "python":
            program = ["-c"] if page.name == "README.md" else ["-m", "tests.docs.program"]
            run(["python", *program, block.text], checkout, block)
        for command in block.commands:
            run(shortened(command), checkout, block)
    if page.name == "README.md":
        shown = json.loads(page.read_text().split("```json\n")[1].split("```")[0])
        written = json.loads((checkout / "runs/mouse/metrics.jsonl").read_text().splitlines()[0])
        assert list(shown) == list(written)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_not_run_says_what_it_needs(page: Path) -> None:
    for block in blocks(page):
        assert block.needs in (None, *NEEDS), f"{page.name}:{block.line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_stands_where_it_would_not_be_run(page: Path) -> None:
    for language, text in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        if language != "console":
            assert not re.search(r"^\$ |^(python|torchrun|pip|make|caduceus-\w+) ", text, re.MULTILINE), text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_and_files_that_commands_name_are_there(page: Path) -> None:
    """Also where a block is not run."""
    for block in blocks(page):
        for command in block.commands:
            for word in shlex.split(command.replace("$(", " ").replace(")", " "), comments=True):
                if word.startswith(("configs/", "data_prep/", "launch/", "tests/", "benchmarks/", "caduceus/")):
                    assert (REPOSITORY / word).exists(), f"{page.name}:{block.line}: {word}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?://)([^)#]*)", text) + re.findall(r'src="([^"]*)"', text):
        assert not target or (page.parent / target).exists(), f"{page.name}: {target}"
