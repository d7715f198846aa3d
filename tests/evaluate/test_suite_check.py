"""Mistakes of a suite that are found before anything is computed."""

from pathlib import Path

import pytest

from caduceus.errors import UserError
from caduceus.evaluate.suite import SuiteRequest, load_suite
from caduceus.evaluate.suite_check import check_suite
from tests.conftest import write_random_fasta
from tests.evaluate.test_suite import as_csv, rows_of, write_layout
from tests.evaluate.test_suite_kinds import write_eqtls, write_parquet


def refusal(name: str, data: Path, genome: Path | None = None, **protocol: object) -> str:
    with pytest.raises(UserError) as caught:
        check_suite(load_suite(name), SuiteRequest(data, None, genome, protocol))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_rows_are_those_of_the_tasks_with_data(tmp_path: Path) -> None:
    write_layout(tmp_path, "parquet by task")
    before = sorted(tmp_path.rglob("*"))
    assert check_suite(load_suite("nt"), SuiteRequest(tmp_path)) == ["H3"]
    assert sorted(tmp_path.rglob("*")) == before


def test_eqtls_have_a_row_for_each_bin_of_distances(tmp_path: Path) -> None:
    for split, path in write_eqtls(tmp_path / "made", 20, 10).items():
        target = tmp_path / "data" / "variant_effect_causal_eqtl" / f"{split}{path.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    names = check_suite(load_suite("lrb"), SuiteRequest(tmp_path / "data"))
    assert names == [f"variant_effect_causal_eqtl, {bin_}" for bin_ in ("0 to 30 kb", "30 to 100 kb", "over 100 kb")]


def test_options_files_and_labels_are_checked(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "tf" / "0").mkdir(parents=True)
    assert "has none of the tasks; it should hold a folder for each task" in refusal("gue", data)
    for split in ("train", "test"):
        (data / "tf" / "0" / f"{split}.csv").write_text(as_csv(rows_of(4, 0)))
    for protocol, message in (
        ({"seeds": 0}, "--seeds: must be at least 1, got 0"),
        ({"epochs": 0}, "--epochs: must be at least 1, got 0"),
        ({"lr": [1e-3, float("nan")]}, "--lr: must be above 0, got nan"),
    ):
        assert refusal("gue", data, **protocol) == message
    (data / "tf" / "0" / "test.csv").write_text("sequence,label\nACGT,2\n")
    assert "test.csv:2: label '2' does not occur in training: 0, 1" in refusal("gue", data)


def test_tasks_without_training_are_checked_too(tmp_path: Path) -> None:
    table = {"chrom": ["1", "1"], "pos": [3, 5], "ref": ["A", "A"], "alt": ["C", "C"], "label": [1, 0]}
    write_parquet(tmp_path / "mendelian_traits_matched_9/test.parquet", table)
    assert "give the genome with --genome" in refusal("traitgym", tmp_path)
    write_random_fasta(tmp_path / "genome.fa", 0, {"chrI": 50})
    assert "--window: must be at least 2, got 1" in refusal("traitgym", tmp_path, tmp_path / "genome.fa", window=1)
    write_parquet(tmp_path / "conservation_within_andropogoneae/test.parquet", {"sequence": ["A"], "label": [3]})
    assert "the label must be 0 or 1, got '3'" in refusal("plantcad", tmp_path)
    assert "--window: must be at least 1, to hold the hidden bases; got 0" in refusal("plantcad", tmp_path, window=0)
