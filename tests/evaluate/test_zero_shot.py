"""Tasks without training: which inputs they refuse, and which earlier scores they take."""

from pathlib import Path

import pytest

from caduceus.errors import UserError
from caduceus.evaluate.columns import read_columns
from caduceus.evaluate.model import Runner
from caduceus.evaluate.zero_shot import ZeroShot, masked, variants
from tests.conftest import write_random_fasta
from tests.evaluate.conftest import made
from tests.evaluate.test_suite_kinds import write_parquet


@pytest.mark.moderate
def test_scores_of_another_window_or_genome_are_not_taken(tmp_path: Path) -> None:
    write_random_fasta(tmp_path / "a.fa", 0, {"chr1": 300})
    text = "".join((tmp_path / "a.fa").read_text().upper().split("\n")[1:])
    (tmp_path / "b.fa").write_text(f">chr1\n{'A' * 90}{text[90:]}\n")
    lines = [f"1,{pos},{text[pos - 1]},{'A' if text[pos - 1] != 'A' else 'C'},{pos % 2}" for pos in range(100, 120)]
    table = tmp_path / "v.csv"
    table.write_text("\n".join(["chrom,pos,ref,alt,label", *lines]))
    runner = Runner(made("ps"))

    def scores(out: str, window: int, genome: str) -> list[float]:
        options = {"score": "minus_llr", "window": window}
        variants(runner, ZeroShot(table, tmp_path / out, "auroc", options, tmp_path / genome))
        return read_columns(tmp_path / out / "scores.parquet").values["llr"]

    first = scores("out", 32, "a.fa")
    wider, other = scores("out", 64, "a.fa"), scores("out", 64, "b.fa")
    assert wider == scores("fresh", 64, "a.fa") != first and other == scores("fresh", 64, "b.fa") != wider


@pytest.mark.parametrize("window", [-3, 0, 1, 2, 4])
def test_a_window_without_the_hidden_bases_is_refused(window: int, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", {"sequence": ["ACGTACGT"] * 4, "label": [0, 1, 0, 1]})
    task = ZeroShot(path, tmp_path / "out", "motif_accuracy", {"places": [3, 4, 5], "window": window})
    runner = Runner(made("ps"))
    if window == 4:  # it begins at base 1, and ends before base 5
        with pytest.raises(UserError, match="--window: must be at least 5, to hold the hidden bases; got 4"):
            masked(runner, task)
        task.options["window"] = 5
        assert masked(runner, task)["rows"] == 4
        return
    with pytest.raises(UserError, match=f"--window: must be at least 5, to hold the hidden bases; got {window}"):
        masked(runner, task)


def test_variants_of_which_none_is_on_the_genome_are_refused(tmp_path: Path) -> None:
    write_random_fasta(tmp_path / "genome.fa", 0, {"chrI": 200})
    (tmp_path / "v.csv").write_text("chrom,pos,ref,alt,label\n1,100,A,C,1\n1,101,A,C,0\n")
    options = {"score": "minus_llr", "window": 32}
    task = ZeroShot(tmp_path / "v.csv", tmp_path / "out", "auroc", options, tmp_path / "genome.fa")
    with pytest.raises(UserError, match="none of its 2 rows has a score; --genome may be another genome"):
        variants(Runner(made("ps")), task)


def test_a_refused_task_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_text("chrom,pos,ref,alt,label\n1,100,A,C,1\n1,101,A,C,0\n")
    options = {"score": "minus_llr", "window": 32}
    with pytest.raises(UserError, match="give the genome with --genome"):
        variants(Runner(made("ps")), ZeroShot(tmp_path / "v.csv", tmp_path / "out" / "task", "auroc", options))
    assert not (tmp_path / "out").exists()
