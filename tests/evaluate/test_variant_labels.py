"""Labels of variants, and how well scores find them."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from caduceus.evaluate.variant_inputs import VariantSource
from caduceus.evaluate.variant_labels import Labels
from tests.evaluate.conftest import text_of
from tests.evaluate.test_variants import WINDOW


def write_labelled(folder: Path, genome: Path) -> tuple[Path, Path, list[float]]:
    """A VCF with labels in INFO, one for a record or each ALT, the same as a table, and the labels by ALT."""
    text, lines, rows, labels = text_of(genome)["chr1"], [], ["chrom\tpos\tref\talt\tclass"], []
    for number, pos in enumerate(range(60, 240, 6)):
        ref = text[pos - 1]
        alts = "ACGT".replace(ref, "")[: 1 + number % 2]
        values = ["bad", "fine", "."][number % 3], ["fine", "bad"][number % 2]
        mine = list(values[: len(alts)]) if number % 4 else [values[0]] * len(alts)
        info = ",".join(mine) if number % 4 else values[0]
        lines.append(f"chr1\t{pos}\t.\t{ref}\t{','.join(alts)}\t.\t.\tDP=1;CLASS={info}")
        rows += [f"chr1\t{pos}\t{ref}\t{alt}\t{value}" for alt, value in zip(alts, mine, strict=True)]
        labels += [{"bad": 1.0, "fine": 0.0, ".": np.nan}[value] for value in mine]
    vcf, table = folder / "labelled.vcf", folder / "labelled.tsv"
    vcf.write_text("##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n" + "\n".join(lines) + "\n")
    table.write_text("\n".join(rows) + "\n")
    return vcf, table, labels


@pytest.mark.moderate
def test_labels_of_info_or_a_column_tell_how_well_scores_find_them(
    tmp_path: Path, genome: Path, model_folder, evaluate, capsys
) -> None:
    from sklearn.metrics import average_precision_score, roc_auc_score

    *files, labels = write_labelled(tmp_path, genome)
    found = {}
    for path in files:
        words = ["--input", path, "--genome", genome, "--window", WINDOW, "--scores", "masked", "embedding"]
        words += ["--label", "CLASS" if path.suffix == ".vcf" else "class", "--positive", "bad"]
        evaluate("variants", "--model", model_folder("ps"), *words, "--out", tmp_path / "out.parquet")
        found[path.suffix] = json.loads((tmp_path / "out.parquet.json").read_text())["areas"]
    assert found[".vcf"] == found[".tsv"]
    known = ~np.isnan(labels)
    truth = np.array(labels)[known]
    table = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pydict()
    llr, cosine = (np.array(table[name])[known] for name in ("llr", "embedding_cosine"))
    areas = found[".vcf"]
    assert (areas["positives"], areas["negatives"]) == ((truth == 1).sum(), (truth == 0).sum())
    for name, effect in {"llr": -llr, "abs_llr": np.abs(llr), "embedding_cosine": cosine}.items():
        assert areas[f"auprc_{name}"] == pytest.approx(average_precision_score(truth, effect), abs=1e-12)
        assert areas[f"auroc_{name}"] == pytest.approx(roc_auc_score(truth, effect), abs=1e-12)
    assert f"auprc_llr  {areas['auprc_llr']:.4f}" in capsys.readouterr().out


def test_a_flag_of_info_is_positive_where_it_stands(tmp_path: Path, genome: Path) -> None:
    text = text_of(genome)["chr1"]
    head = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    rows = [f"chr1\t{p}\t.\t{text[p - 1]}\t.\t.\t.\t{'DP=1;HIT' if p % 2 else '.'}\n" for p in range(1, 7)]
    (tmp_path / "in.vcf").write_text(head + "".join(rows))
    assert Labels("HIT").of(VariantSource(tmp_path / "in.vcf", genome).read()).tolist() == [1, 0, 1, 0, 1, 0]


def test_labels_that_say_nothing_end_in_one_line(tmp_path: Path, genome: Path, model_folder, refused) -> None:
    vcf, table, _ = write_labelled(tmp_path, genome)
    words = ["variants", "--model", model_folder("ps"), "--genome", genome, "--out", tmp_path / "out.tsv"]
    for more, message in {
        ("--input", vcf, "--label", "AF"): "labelled.vcf: no record has 'AF' in INFO; they have CLASS, DP",
        ("--input", table, "--label", "AF"): "no column 'AF' for the labels (--label); it has chrom",
        ("--input", vcf, "--label", "CLASS"): "labelled.vcf:3: CLASS is 'bad'; give the positive values",
        ("--input", vcf, "--label", "DP"): "no variant is negative by DP, which has 1; give the positive values",
        ("--input", vcf, "--positive", "bad"): "--positive: names values of --label, which is missing",
    }.items():
        assert message in refused(*words, *more), more
    assert not list(tmp_path.glob("out.tsv*"))
