"""Small trained-looking models, and commands run in this process."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from caduceus import CaduceusConfig, CaduceusForMaskedLM
from caduceus.errors import UserError
from caduceus.evaluate.__main__ import main
from caduceus.hub import save_imported
from tests.conftest import write_random_fasta
from tests.model.packed import KINDS as OF_MODELS

KINDS = OF_MODELS | {"plantcad2": {"rcps": True, "vocab_size": 8, "mixer": "mamba2", "headdim": 4}}


def made(kind: str, dtype: torch.dtype = torch.float64) -> CaduceusForMaskedLM:
    """A small model whose every parameter matters, the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CaduceusForMaskedLM(CaduceusConfig(d_model=8, n_layer=2, d_state=3, d_conv=3, **KINDS[kind]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small model of a kind."""
    root = tmp_path_factory.mktemp("models")

    def folder(kind: str) -> Path:
        if not (root / kind).is_dir():
            save_imported(made(kind, torch.float32), root / kind)
        return root / kind

    return folder


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`python -m caduceus.evaluate` with these words, in this process."""

    def run(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["caduceus-evaluate", *map(str, words)])
        return main()

    return run


@pytest.fixture
def refused(evaluate: Callable[..., int]) -> Callable[..., str]:
    """The one line that a command ends with."""

    def run(*words: object) -> str:
        with pytest.raises(UserError) as caught:
            evaluate(*words)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return run


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A FASTA of two short contigs."""
    path = tmp_path_factory.mktemp("genome") / "genome.fa"
    write_random_fasta(path, 5, {"chr1": 300, "chr2": 60})
    return path


def text_of(genome: Path) -> dict[str, str]:
    """The bases of a FASTA, by contig."""
    records = genome.read_text().upper().split(">")[1:]
    return {record.split("\n")[0].lower(): "".join(record.split("\n")[1:]) for record in records}
