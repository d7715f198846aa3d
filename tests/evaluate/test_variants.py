"""Scores equal a slow computation, one variant and strand at a time, and files come back whole."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pysam
import pytest
import torch

from caduceus import CaduceusForMaskedLM
from caduceus.alphabet import reverse_complement
from caduceus.evaluate import variants as variants_module
from caduceus.evaluate.alleles import Allele, prepare
from caduceus.evaluate.columns import read_columns
from caduceus.evaluate.model import Runner
from caduceus.evaluate.scores import ScoreOptions, score_variants
from caduceus.evaluate.variant_inputs import VariantSource
from caduceus.evaluate.variants import score_file
from caduceus.evaluate.windows import Windows
from tests.evaluate.conftest import made, text_of

WINDOW, FLANK = 32, 3
ALL = ("masked", "unmasked", "embedding")


class Slow:
    """One forward pass for each place, written without what it tests."""

    def __init__(self, model: CaduceusForMaskedLM, text: str) -> None:
        self.model, self.text = model, text

    def window(self, text: str, first: int) -> np.ndarray:
        padded = "N" * WINDOW + text + "N" * WINDOW
        return np.frombuffer(padded[first + WINDOW : first + 2 * WINDOW].encode(), np.uint8)

    @torch.no_grad()
    def log_p(self, bases: np.ndarray, hidden: list[int], place: int, strand: int) -> np.ndarray:
        vocabulary = self.model.config.vocabulary
        if strand:
            bases, hidden, place = reverse_complement(bases), [WINDOW - 1 - h for h in hidden], WINDOW - 1 - place
        ids = torch.from_numpy(vocabulary.encode(bases).astype(np.int64))
        ids[hidden] = vocabulary.mask
        logits = self.model(ids[None]).logits[0, place, list(vocabulary.bases)]
        found = logits.log_softmax(-1).numpy()
        return found[::-1] if strand else found

    def substitution(self, start: int, ref: str, alt: str, first: int, mask: bool, strand: int) -> float:
        bases = self.window(self.text, first)
        places = [start + i - first for i in range(len(ref)) if ref[i] != alt[i]]
        total = 0.0
        for place in places:
            log_p = self.log_p(bases, places if mask else [], place, strand)
            index = place + first - start
            total += log_p["ACGT".index(alt[index])] - log_p["ACGT".index(ref[index])]
        return total

    def indel(self, start: int, ref: str, alt: str, mask: bool, strand: int) -> float:
        changed = self.text[:start] + alt + self.text[start + len(ref) :]
        sums = []
        for text, length in ((self.text, len(ref)), (changed, len(alt))):
            bases = self.window(text, start - WINDOW // 2)
            middle = WINDOW // 2
            places = [*range(middle - FLANK, middle), *range(middle + length, middle + length + FLANK)]
            of_text = [(place, "ACGT".index(chr(bases[place]))) for place in places]
            sums.append(sum(self.log_p(bases, places if mask else [], p, strand)[b] for p, b in of_text))
        return sums[1] - sums[0]

    @torch.no_grad()
    def embedding(self, text: str, first: int, strand: int) -> np.ndarray:
        bases = self.window(text, first)
        bases = reverse_complement(bases) if strand and not self.model.config.rcps else bases
        ids = torch.from_numpy(self.model.config.vocabulary.encode(bases).astype(np.int64))[None]
        states = self.model(ids, output_hidden_states=True).hidden_states[-1][:, 0]
        return states[strand if self.model.config.rcps else 0].mean(0).numpy()


def some_alleles(text: str) -> list[Allele]:
    other = {base: "ACGT"[("ACGT".index(base) + 1) % 4] for base in "ACGT"}
    found = [(pos, text[pos - 1], other[text[pos - 1]]) for pos in (1, 10, 150, 151, 299)]
    found += [(150, text[149], other[other[text[149]]]), (200, text[199:202], "".join(other[b] for b in text[199:202]))]
    found += [(100, text[99:103], text[99]), (120, text[119], text[119] + "GA"), (140, text[139:142], "TTTTT")]
    return [Allele("chr1", *row, "test") for row in found]


@pytest.mark.moderate
@pytest.mark.parametrize("kind", ["ps", "ph", "plantcad2"])
def test_scores_equal_a_slow_computation(kind: str, genome: Path) -> None:
    model, windows = made(kind), Windows(genome)
    slow = Slow(model, text_of(genome)["chr1"])
    variants = prepare(some_alleles(slow.text), windows)
    assert {variant.kind for variant in variants} == {"snv", "mnv", "indel"}
    options = ScoreOptions(ALL, WINDOW, "each", FLANK)
    found = score_variants(Runner(model), windows, variants, options)
    for number, v in enumerate(variants):
        first = v.start - WINDOW // 2
        half = WINDOW // 2
        tile = (v.start - WINDOW // 4) // half * half
        for name, mask, begin in (("llr", True, first), ("llr_unmasked", False, tile)):
            expected = [
                slow.indel(v.start, v.ref, v.alt, mask, strand)
                if v.kind == "indel"
                else slow.substitution(v.start, v.ref, v.alt, begin, mask, strand)
                for strand in (0, 1)
            ]
            mine = [found[f"{name}_{strand}"][number] for strand in ("forward", "reverse")]
            assert mine == pytest.approx(expected, abs=1e-10), (v, name)
            assert found[name][number] == pytest.approx(np.mean(expected), abs=1e-10)
        changed = slow.text[: v.start] + v.alt + slow.text[v.start + len(v.ref) :]
        one, other = (np.mean([slow.embedding(t, first, s) for s in (0, 1)], 0) for t in (slow.text, changed))
        assert found["embedding_l2"][number] == pytest.approx(np.linalg.norm(one - other), abs=1e-10)
        if v.kind == "snv":
            log_p = np.mean([slow.log_p(slow.window(slow.text, first), [half], half, s) for s in (0, 1)], 0)
            p = np.exp(log_p) / np.exp(log_p).sum()
            assert [found[f"p_{base}"][number] for base in "ACGT"] == pytest.approx(p, abs=1e-10)
            assert found["entropy"][number] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-10)
        else:
            assert np.isnan(found["entropy"][number])


def test_strands_of_a_ps_are_equal_and_a_swap_turns_the_sign(genome: Path) -> None:
    windows, text = Windows(genome), text_of(genome)["chr1"]
    alleles = some_alleles(text)
    runner, options = Runner(made("ps")), ScoreOptions(("masked",), WINDOW, "each", FLANK)
    found = score_variants(runner, windows, prepare(alleles, windows), options)
    assert found["llr_forward"] == pytest.approx(found["llr_reverse"], abs=1e-12)
    turned = prepare([Allele(a.contig, a.pos, a.alt, a.ref, a.place) for a in alleles], windows, "swap")
    scored = [n for n, variant in enumerate(turned) if variant.swapped]
    assert len(scored) >= 7
    again = score_variants(runner, windows, turned, options)["llr"]
    assert again[scored] == pytest.approx(-found["llr"][scored], abs=1e-12)


def test_a_window_is_run_once(genome: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    windows, text = Windows(genome), text_of(genome)["chr1"]
    snvs = [Allele("chr1", p, text[p - 1], alt, "") for p in range(100, 110) for alt in "ACGT" if alt != text[p - 1]]
    runner, rows = Runner(made("ps")), []
    real = runner.ids
    monkeypatch.setattr(runner, "ids", lambda bases: rows.append(len(bases)) or real(bases))
    score_variants(runner, windows, prepare(snvs, windows), ScoreOptions(("masked",), WINDOW))
    assert sum(rows) == 10
    rows.clear()
    score_variants(runner, windows, prepare(snvs, windows), ScoreOptions(("unmasked",), WINDOW))
    assert sum(rows) <= 2


def write_vcf(path: Path, genome: Path) -> list[str]:
    text = text_of(genome)["chr1"]
    other = "ACGT".replace(text[149], "")
    rows = [
        f"1\t100\trs1\t{text[99]}\t{'A' if text[99] != 'A' else 'C'}\t9\tPASS\tAC=1\tGT\t0/1",
        f"chr1\t150\t.\t{text[149]}\t{other[0]},<DEL>,{other[1]}\t.\t.\t.\tGT\t./.",
        f"chr1\t160\t.\t{text[159]}\t.\t.\t.\t.\tGT\t./.",
        f"chr1\t170\t.\t{text[169:175]}\t{text[169]}\t.\t.\tCADUCEUS_LLR=9;DP=3\tGT\t./.",
    ]
    head = ["##fileformat=VCFv4.2", '##INFO=<ID=AC,Number=A,Type=Integer,Description="a">', "##contig=<ID=chr1>"]
    head += ["##contig=<ID=1>", '##FORMAT=<ID=GT,Number=1,Type=String,Description="g">']
    head += ['##INFO=<ID=DP,Number=1,Type=Integer,Description="d">']
    columns = "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tS"
    path.write_bytes(gzip.compress("\n".join([*head, columns, *rows]).encode()))
    return rows


@pytest.mark.moderate
def test_a_vcf_comes_back_with_scores(tmp_path: Path, genome: Path, model_folder, evaluate) -> None:
    rows = write_vcf(tmp_path / "in.vcf.gz", genome)
    words = ["variants", "--model", model_folder("ph"), "--input", tmp_path / "in.vcf.gz", "--genome", genome]
    words += ["--window", WINDOW, "--scores", *ALL]
    for name in ("out.vcf", "out.vcf.gz", "out.tsv", "out.parquet"):
        evaluate(*words, "--out", tmp_path / name)
    table = read_columns(tmp_path / "out.tsv").values
    assert table["alt"] == [rows[0].split("\t")[4], *rows[1].split("\t")[4].split(","), ".", rows[3].split("\t")[4]]
    assert table["kind"] == ["snv", "snv", "", "snv", "", "indel"]
    assert table["note"] == ["", "", "symbolic", "", "no alternative", ""]
    exact = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pydict()
    with pysam.VariantFile(str(tmp_path / "out.vcf")) as file:  # htslib reads what was added
        records = list(file)
        assert file.header.info["CADUCEUS_LLR"].number == "A"
        assert "negative where the model finds ALT less likely" in file.header.info["CADUCEUS_LLR"].description
    assert [str(r.pos) for r in records] == ["100", "150", "160", "170"]
    llr = exact["llr"]
    assert records[0].info["CADUCEUS_LLR"][0] == pytest.approx(llr[0], rel=1e-5) and records[0].info["AC"] == (1,)
    assert records[1].info["CADUCEUS_LLR"] == (pytest.approx(llr[1], rel=1e-5), None, pytest.approx(llr[3], rel=1e-5))
    assert sum(records[1].info["CADUCEUS_P"]) == pytest.approx(1, abs=1e-5)
    assert not [key for key in records[2].info if key.startswith("CADUCEUS")]
    assert records[3].info["CADUCEUS_LLR"][0] == pytest.approx(llr[5], rel=1e-5) and records[3].info["DP"] == 3
    assert pysam.BGZFile(str(tmp_path / "out.vcf.gz")).read() == (tmp_path / "out.vcf").read_bytes()
    made_from = json.loads((tmp_path / "out.vcf.json").read_text())
    assert made_from["counts"] == {"indel": 1, "no alternative": 1, "snv": 3, "symbolic": 1}


def test_sorted_records_have_an_index(tmp_path: Path, genome: Path) -> None:
    text = text_of(genome)["chr1"]
    row = "\t".join(["chr1", "100", ".", text[99], "A" if text[99] != "A" else "C"])
    (tmp_path / "in.vcf").write_text(f"##contig=<ID=chr1>\n#CHROM\tPOS\tID\tREF\tALT\n{row}\n")
    source = VariantSource(tmp_path / "in.vcf", genome)
    score_file(Runner(made("ps")), source, tmp_path / "out.vcf.gz", ScoreOptions(window=WINDOW))
    with pysam.TabixFile(str(tmp_path / "out.vcf.gz")) as index:
        assert [line.split("\t")[1] for line in index.fetch("chr1", 90, 110)] == ["100"]


def test_every_substitution_of_places(tmp_path: Path, genome: Path, model_folder, evaluate) -> None:
    (tmp_path / "places.bed").write_text("chr1\t100\t104\nchr2\t0\t2\n")
    out = tmp_path / "out.parquet"
    words = ["--genome", genome, "--window", WINDOW, "--out", out]
    evaluate("variants", "--model", model_folder("ps"), "--every-snv", tmp_path / "places.bed", *words)
    found = pyarrow.parquet.read_table(out).to_pydict()
    text = text_of(genome)
    assert found["pos"] == [p for p in (101, 102, 103, 104, 1, 2) for _ in range(3)]
    alleles = [
        Allele(c, p, r, a, "") for c, p, r, a in zip(*(found[k] for k in ("chrom", "pos", "ref", "alt")), strict=True)
    ]
    assert all(a.ref == text[a.contig][a.pos - 1] != a.alt for a in alleles)
    windows = Windows(genome)
    again = score_variants(Runner(model_folder("ps")), windows, prepare(alleles, windows), ScoreOptions(window=WINDOW))
    assert found["llr"] == pytest.approx(again["llr"], abs=1e-6)


def test_tracks_tell_of_each_place(tmp_path: Path, genome: Path, model_folder, evaluate, refused) -> None:
    tracks = pytest.importorskip("pyBigWig", reason="of the extra `evaluate`")
    (tmp_path / "places.bed").write_text("chr2\t0\t3\nchr1\t100\t104\nchr1\t102\t106\n")  # in no order, and overlapping
    words = ["variants", "--model", model_folder("ps"), "--genome", genome, "--window", WINDOW]
    words += ["--out", tmp_path / "out.parquet", "--tracks", tmp_path / "t"]
    evaluate(*words, "--every-snv", tmp_path / "places.bed")
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pydict()
    rows_of_places = list(zip(found["chrom"], found["pos"], strict=True))
    for name in ("entropy", "llr"):
        with tracks.open(str(tmp_path / f"t.{name}.bw")) as file:
            assert file.chroms() == {"chr1": 300, "chr2": 60}
            for contig, first, end in (("chr1", 100, 106), ("chr2", 0, 3)):
                values = file.values(contig, first, end)
                for place, value in enumerate(values, first):
                    rows = [n for n, row in enumerate(rows_of_places) if row == (contig, place + 1)]
                    assert value == pytest.approx(np.mean([found[name][n] for n in rows]), rel=1e-6)
            assert np.isnan(file.values("chr1", 99, 100)).all() and np.isnan(file.values("chr1", 106, 107)).all()
    assert not list(tmp_path.glob(".*")) and "so it goes only with --every-snv" in refused(*words, "--input", "no.vcf")
    message = refused(*words, "--every-snv", tmp_path / "places.bed", "--scores", "embedding")
    assert "--tracks: needs masked or unmasked scores" in message


def test_rows_may_bring_their_own_windows(tmp_path: Path, genome: Path) -> None:
    text = text_of(genome)["chr1"]
    first, pos = 100 - WINDOW // 2 - 1, 100
    alt = "A" if text[99] != "A" else "C"
    head = "chr\tstart\tend\tpos\tref\talt\tsequences\n"
    row = f"chr1\t{first}\t0\t{pos}\t{text[99]}\t{alt}\t{text[first : first + WINDOW]}\n"
    (tmp_path / "own.tsv").write_text(head + row)
    runner, options = Runner(made("ph")), ScoreOptions(window=WINDOW)
    score_file(runner, VariantSource(tmp_path / "own.tsv"), tmp_path / "out.tsv", options)
    windows = Windows(genome)
    expected = score_variants(runner, windows, prepare([Allele("chr1", pos, text[99], alt, "")], windows), options)
    found = read_columns(tmp_path / "out.tsv").values
    assert float(found["llr"][0]) == pytest.approx(expected["llr"][0], rel=1e-6)
    assert found["chr"] == ["chr1"] and found["start"] == [str(first)]


def test_a_command_that_was_killed_goes_on(tmp_path: Path, genome: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = text_of(genome)["chr1"]
    rows = [f"chr1,{pos},{text[pos - 1]},{'A' if text[pos - 1] != 'A' else 'C'}\n" for pos in (50, 60, 70, 80)]
    (tmp_path / "in.csv").write_text("chrom,pos,ref,alt\n" + "".join(rows))
    monkeypatch.setattr(variants_module, "_PART", 1)
    source, runner, options = VariantSource(tmp_path / "in.csv", genome), Runner(made("ps")), ScoreOptions(window=16)
    score_file(runner, source, tmp_path / "whole.csv", options)
    calls, real = [], score_variants

    def dying(*arguments: object) -> dict[str, np.ndarray]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(variants_module, "score_variants", dying)
    with pytest.raises(KeyboardInterrupt):
        score_file(runner, source, tmp_path / "out.csv", options)
    assert not (tmp_path / "out.csv").exists()
    score_file(runner, source, tmp_path / "out.csv", options)
    assert len(calls) == 5 and (tmp_path / "out.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
