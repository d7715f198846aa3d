"""Every suite on real data laid out as its users have it, by the command; killed before its end, and resumed."""

import csv
import gzip
import json
import re
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from caduceus.evaluate import suite as suite_module
from caduceus.evaluate.windows import Windows

QUICK = ["--seeds", 1, "--epochs", 1, "--lr", 0.01, "--batch-size", 16]


def gue_rows(data: Path, split: str, count: int) -> list[tuple[str, int]]:
    with gzip.open(data / f"benchmarks/gue_tf_0/{split}.csv.gz", "rt") as file:
        return [(row["sequence"][:40], int(row["label"])) for row in islice(csv.DictReader(file), count)]


def write_parquet(path: Path, columns: dict[str, list]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def yeast_snvs(data: Path, count: int) -> dict[str, list]:
    """Real variants, every third of them called positive, which means nothing."""
    columns: dict[str, list] = {name: [] for name in ("chrom", "pos", "ref", "alt", "label")}
    with gzip.open(data / "yeast/sacCer3_sample_variants.vcf.gz", "rt") as file:
        rows = (line.split("\t") for line in file if not line.startswith("#"))
        snvs = (row for row in rows if len(row[3]) == len(row[4]) == 1)
        for number, row in enumerate(islice(snvs, count)):
            label = number % 3 == 0
            for name, value in zip(
                columns, (row[0].removeprefix("chr"), int(row[1]), row[3], row[4], label), strict=True
            ):
                columns[name].append(value)
    return columns


def nt(folder: Path, data: Path) -> list[object]:
    for split in ("train", "test"):
        sequences, labels = zip(*gue_rows(data, split, 32), strict=True)
        names = [f"s|{n}" for n in range(32)]
        write_parquet(
            folder / f"H3/{split}-00000-of-00001.parquet", {"sequence": sequences, "name": names, "label": labels}
        )
    return [*QUICK, "--tasks", "H3", "H4"]


def gue(folder: Path, data: Path) -> list[object]:
    (folder / "tf/0").mkdir(parents=True)
    for split in ("train", "dev", "test"):
        lines = "".join(f"{sequence},{label}\n" for sequence, label in gue_rows(data, split, 32))
        (folder / f"tf/0/{split}.csv").write_text(f"sequence,label\n{lines}")
    return [*QUICK, "--tasks", "tf_0", "tf_1"]


def gb(folder: Path, data: Path) -> list[object]:
    """Places on chromosome 4 alone, each cut short."""
    source = data / "benchmarks/genomic_benchmarks/drosophila_enhancers_stark"
    for table in source.glob("*/*.csv.gz"):
        with gzip.open(table, "rt") as file:
            rows = [row for row in csv.DictReader(file) if row["region"] == "chr4"][:8]
        target = folder / source.name / table.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        with gzip.open(target, "wt") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({**row, "end": int(row["start"]) + 60} for row in rows)
    text = gzip.decompress(next((data / "drosophila").glob("DmelanDM6_4_*")).read_bytes()).decode()
    (folder / "genome.fa").write_text("\n".join([">chr4", *text.split("\n")[1:]]))
    return [*QUICK, "--genome", folder / "genome.fa", "--tasks", "drosophila_enhancers_stark"]


def traitgym(folder: Path, data: Path) -> list[object]:
    write_parquet(folder / "complex_traits_matched_9/test.parquet", yeast_snvs(data, 60))
    return ["--genome", data / "yeast/sacCer3.fa.gz", "--window", 64]


def lrb(folder: Path, data: Path) -> list[object]:
    genome, rows = Windows(data / "yeast/sacCer3.fa.gz"), yeast_snvs(data, 120)
    sequences = []
    for chrom, pos, alt in zip(rows["chrom"], rows["pos"], rows["alt"], strict=True):
        text = genome.read(genome.find(chrom), pos - 33, pos + 31).tobytes().decode()
        sequences.append((text, text[:32] + alt + text[33:]))
    for split, part in (("train", slice(0, 80)), ("test", slice(80, 120))):
        refs, alts = zip(*sequences[part], strict=True)
        columns = {"ref_forward_sequence": refs, "alt_forward_sequence": alts, "label": rows["label"][part]}
        columns |= {"tissue": ["liver"] * len(refs), "chromosome": rows["chrom"][part], "position": rows["pos"][part]}
        distance = [50_000 * (n % 2) for n in range(len(refs))]
        write_parquet(
            folder / f"variant_effect_causal_eqtl/{split}.parquet", {**columns, "distance_to_nearest_tss": distance}
        )
    refs, alts = zip(*sequences[:40], strict=True)
    columns = {"ref_forward_sequence": refs, "alt_forward_sequence": alts, "label": rows["label"][:40]}
    write_parquet(folder / "variant_effect_pathogenic_omim/test.parquet", columns)
    for split in ("train", "test"):
        texts, found = [text for text, _ in gue_rows(data, split, 32)], [n % 2 for n in range(32)]
        of_two = {"sequence": texts, "labels": found, "chromosome": ["1"] * 32}
        write_parquet(folder / f"regulatory_element_promoter/{split}-00000-of-00001.parquet", of_two)
        marks = [[n % 2, n // 2 % 2, label] for n, label in enumerate(found)]
        write_parquet(folder / f"chromatin_features_histone_marks/{split}.parquet", {**of_two, "labels": marks})
        values = [[text.count("G") / 40, text.count("A") / 40, float(n)] for n, text in enumerate(texts)]
        write_parquet(folder / f"bulk_rna_expression/{split}.parquet", {**of_two, "labels": values})
    return [*QUICK, "--window", 16]


def plantcad(folder: Path, data: Path) -> list[object]:
    folder.mkdir(exist_ok=True)
    lines = (data / "variants/maize_snp_with_sequences.tsv").read_text().splitlines()
    labelled = [f"{line}\t{n % 2}" for n, line in enumerate(lines[1:41])]
    (folder / "maize_snp_with_sequences.tsv").write_text("\n".join([f"{lines[0]}\tlabel", *labelled]) + "\n")
    return ["--tasks", "variants", "tis_recovery_maize"]


@pytest.mark.slow
@pytest.mark.parametrize("make", [nt, gue, gb, traitgym, lrb, plantcad], ids=lambda make: make.__name__)
def test_a_suite_runs_on_the_folders_of_its_users(
    make,
    tmp_path: Path,
    shared_data: Path,
    model_folder,
    evaluate,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    more = make(tmp_path / "data", shared_data)
    words = ["suite", "--model", model_folder("ps"), "--suite", make.__name__, "--data", tmp_path / "data"]
    words += [*more, "--out", tmp_path / "out"]
    real = suite_module.write_page
    monkeypatch.setattr(suite_module, "write_page", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluate(*words)
    monkeypatch.setattr(suite_module, "write_page", real)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.np[yz]")}
    evaluate(*words)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.np[yz]")}
    rows = json.loads((tmp_path / "out/suite.json").read_bytes())["tasks"]
    done = [row for row in rows if row.get("mean") is not None]
    low = {"mcc": -1, "r2": -np.inf}
    assert done and all(low.get(row["metric"], 0) <= row["mean"] <= 1 and len(row["interval"]) == 2 for row in done)
    trained = {"regulatory_element_promoter", "chromatin_features_histone_marks", "bulk_rna_expression"}
    assert make is not lrb or trained <= {row["task"] for row in done}
    assert make is not lrb or [row["task"].partition(", ")[2] for row in rows[:3]] == [
        "0 to 30 kb",
        "30 to 100 kb",
        "over 100 kb",
    ]
    assert make is not plantcad or done[0]["rows"] == 41  # one of 40 lines has two alternatives
    html, said = (tmp_path / "out/suite.html").read_text(), capsys.readouterr().out
    assert "<svg" in html and done[0]["task"] in html and done[0]["task"] in said
    named = [name for text in re.findall("<p>([^<]*) (?:is|are) missing: ", html) for name in text.split(", ")]
    assert named == [row["task"] for row in rows if "missing" in row]
    shutil.rmtree(tmp_path)
