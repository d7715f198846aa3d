"""Tasks without training, and the SVM on windows: against slow computations of their own, and end to end."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from caduceus.alphabet import reverse_complement
from caduceus.errors import UserError
from caduceus.evaluate import window_svm as svm_module
from caduceus.evaluate.metrics import ranking
from caduceus.evaluate.model import Runner
from caduceus.evaluate.pairs import PairTable
from caduceus.evaluate.parts import Parts
from caduceus.evaluate.suite import SuiteRequest, load_suite, run_suite
from caduceus.evaluate.window_svm import SvmTask, window_svm
from caduceus.evaluate.zero_shot import ZeroShot, masked, pairs, structural
from tests.conftest import write_random_fasta
from tests.evaluate.conftest import made

BASES = "ACGT"


def random_text(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list(BASES), length))


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=5)
    return path


def log_p(runner: Runner, text: str, hidden: list[int]) -> np.ndarray:
    """log p of A, C, G, T at every place, (L, 4): one strand after the other, whole logits."""
    found = []
    for reverse in (False, True):
        bases = np.frombuffer(text.encode(), np.uint8)
        ids = runner.ids(reverse_complement(bases) if reverse else bases)[None]
        for place in hidden:
            ids[0, len(text) - 1 - place if reverse else place] = runner.config.vocabulary.mask
        with torch.no_grad():
            logits = runner.model(ids).logits[0][:, list(runner.config.vocabulary.bases)].double()
        rows = torch.log_softmax(logits, -1).numpy()
        found.append(rows[::-1, ::-1] if reverse else rows)
    return found[0] if runner.config.rcps else np.mean(found, 0)


def captured(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The scores that a task is ranked by."""
    seen: list[np.ndarray] = []

    def keep(task: ZeroShot, labels: np.ndarray, scores: np.ndarray, groups: object) -> dict:
        seen.append(scores)
        return {}

    monkeypatch.setattr("caduceus.evaluate.zero_shot._ranked", keep)
    return seen


@pytest.mark.moderate
@pytest.mark.parametrize("kind", ["ps", "ph"])
def test_scores_are_those_of_their_definition(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, runner, seen = np.random.default_rng(0), Runner(made(kind)), captured(monkeypatch)
    texts, labels = [random_text(rng, 30) for _ in range(12)], [n % 2 for n in range(12)]
    texts[3] = texts[3][:14] + "N" + texts[3][15:]  # a place without a known base counts as 0
    table = write_parquet(tmp_path / "a.parquet", {"sequence": texts, "label": labels})
    masked(runner, ZeroShot(table, tmp_path / "masked", "auroc", {"places": [14, 15]}))
    expected = [
        np.mean([np.exp(log_p(runner, t, [14, 15])[n][BASES.index(t[n])]) if t[n] in BASES else 0 for n in (14, 15)])
        for t in texts
    ]
    assert seen.pop() == pytest.approx(expected, abs=1e-12)

    pair = [(t.replace("N", "A"), "C" if t[15] != "C" else "T") for t in texts]
    mutated = [t[:15] + alt + t[16:] for t, alt in pair]
    columns = {"ref_forward_sequence": [t for t, _ in pair], "alt_forward_sequence": mutated, "label": labels}
    write_parquet(tmp_path / "pairs.parquet", columns)
    task = ZeroShot(tmp_path / "pairs.parquet", tmp_path / "pairs", "auroc", {"score": "abs_llr", "length": 30})
    pairs(runner, task)
    ratios = [
        abs(np.subtract(*(log_p(runner, t, [15])[15][BASES.index(base)] for base in (alt, t[15])))) for t, alt in pair
    ]
    assert seen.pop() == pytest.approx(ratios, abs=1e-12)

    left, right, flank = 12, 14, 3  # bases 12 to 14, from 1, are missing
    cut = [(t + random_text(rng, 3))[: left - 1] + (t + random_text(rng, 3))[right:] for t, _ in pair]
    shifted = [random_text(rng, 4) + t for t in cut]  # so that the break is in the middle
    assert all(len(t) // 2 == left - 1 + 4 + 2 for t in shifted)
    shifted = [t[2:] + "AC" for t in shifted]
    middle = len(shifted[0]) // 2
    columns = {"RefSeq": [t for t, _ in pair], "MutSeq": shifted, "left": [left] * 12, "right": [right] * 12}
    write_parquet(tmp_path / "sv.parquet", {**columns, "label": labels})
    structural(runner, ZeroShot(tmp_path / "sv.parquet", tmp_path / "sv", "auprc", {"flank": flank}))
    scores = []
    for (ref, _), mut in zip(pair, shifted, strict=True):
        before, after = log_p(runner, ref, []), log_p(runner, mut, [])
        ref_places = [*range(left - 1 - flank, left - 1), *range(right, right + flank)]
        mut_places = range(middle - flank, middle + flank)
        ratios = [
            after[m][BASES.index(mut[m])] - before[r][BASES.index(mut[m])]
            for r, m in zip(ref_places, mut_places, strict=True)
        ]
        scores.append(-np.mean(ratios))
    assert seen.pop() == pytest.approx(scores, abs=1e-12)


def test_a_window_of_hidden_bases_is_cut_about_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng, runner, seen = np.random.default_rng(1), Runner(made("ps")), captured(monkeypatch)
    texts = [random_text(rng, 40) for _ in range(4)]
    table = write_parquet(tmp_path / "a.parquet", {"sequence": texts, "label": [0, 1, 0, 1]})
    masked(runner, ZeroShot(table, tmp_path / "out", "auroc", {"places": [20, 21], "window": 16}))
    expected = [
        np.mean([np.exp(log_p(runner, t[12:28], [8, 9])[n][BASES.index(t[12 + n])]) for n in (8, 9)]) for t in texts
    ]
    assert seen.pop() == pytest.approx(expected, abs=1e-12)


@pytest.mark.moderate
def test_motifs_are_right_where_all_their_bases_are(tmp_path: Path) -> None:
    runner, rng = Runner(made("ps")), np.random.default_rng(2)
    texts = [random_text(rng, 20) for _ in range(40)]
    right = [all(log_p(runner, t, [9, 10])[n].argmax() == BASES.index(t[n]) for n in (9, 10)) for t in texts]
    assert 0 < sum(right) < 40
    table = write_parquet(tmp_path / "a.parquet", {"sequence": texts})
    row = masked(runner, ZeroShot(table, tmp_path / "out", "motif_accuracy", {"places": [9, 10]}))
    assert row["mean"] == pytest.approx(np.mean(right)) and row["interval"][0] <= row["mean"] <= row["interval"][1]


def test_ranking_by_chromosome_weighs_chromosomes_by_their_variants() -> None:
    rng = np.random.default_rng(0)
    labels, scores, groups = rng.integers(2, size=60) == 1, rng.random(60), rng.integers(3, size=60)
    labels[groups == 2] = False  # a chromosome without positives says nothing
    sizes = [(groups == n).sum() for n in (0, 1)]
    for metric, area in (("auprc_by_chrom", average_precision_score), ("auroc_by_chrom", roc_auc_score)):
        parts = [area(labels[groups == n], scores[groups == n]) for n in (0, 1)]
        assert ranking(metric, labels, scores, groups) == pytest.approx(np.average(parts, weights=sizes), abs=1e-12)
    assert ranking("auroc", labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert np.isnan(ranking("auprc", labels[groups == 2], scores[groups == 2]))


def write_eqtls(folder: Path, count: int, length: int) -> dict[str, Path]:
    """GC-rich sequences are positive; one row in ten is mostly N."""
    found = {}
    for seed, split in enumerate(("train", "test")):
        rng = np.random.default_rng(seed)
        columns: dict[str, list] = {name: [] for name in ("ref_forward_sequence", "alt_forward_sequence")}
        label = [int(value) for value in rng.integers(2, size=count)]
        for row, one in enumerate(label):
            share = 0.35 + 0.3 * one
            p = [(1 - share) / 2, share / 2, share / 2, (1 - share) / 2]
            text = "".join(rng.choice(list(BASES), length, p=p))
            text = "N" * (length // 4) + text[length // 4 :] if row % 10 == 9 else text
            place = length // 2 if row % 3 else length // 2 + 3
            alt = text[:place] + ("A" if text[place] != "A" else "C") + text[place + 1 :]
            columns["ref_forward_sequence"].append(text)
            columns["alt_forward_sequence"].append(alt)
        more = {
            "tissue": [f"t{n % 3}" for n in range(count)],
            "distance_to_nearest_tss": [40_000 * (n % 2) for n in range(count)],
        }
        found[split] = write_parquet(folder / f"{split}-00000-of-00001.parquet", {**columns, "label": label, **more})
    return found


@pytest.mark.parametrize("kind", ["ps", "ph"])
def test_windows_lie_at_the_same_bases_on_both_strands(kind: str, tmp_path: Path) -> None:
    tables, runner = write_eqtls(tmp_path, 11, 41), Runner(made(kind))
    table = PairTable(tables["train"])
    task = SvmTask(tables, tmp_path / "out", {"window": 8, "length": 41})
    means, shares = svm_module._window_means(runner, task, "train", table)
    assert shares[9] == pytest.approx(10 / 41) and means.shape == (11, 2 * runner.config.d_model)
    for row in range(11):
        pair = table.read(row)
        assert pair.place == 20 + 3 * (row % 3 == 0)
        expected = []
        for bases in (pair.ref, pair.alt):
            ids = runner.ids(bases)[None]
            with torch.no_grad():
                held = runner.states(ids, runner.config.n_layer)[:, 0]  # (S, L, D) in forward coordinates
                if len(held) == 1:
                    other = runner.states(runner.ids(reverse_complement(bases))[None], runner.config.n_layer)[0, 0]
                    held = torch.stack([held[0], other.flip(0)])
            window = list(range(pair.place - 4, pair.place + 5))
            expected.append(held[:, window].mean((0, 1)).numpy())
        assert means[row] == pytest.approx(np.concatenate(expected), abs=1e-12)


@pytest.mark.moderate
def test_eqtls_are_told_apart_by_distance_and_the_same_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables, runner = write_eqtls(tmp_path, 80, 40), Runner(made("ps"))
    options = {"window": 16, "length": 40, "C": [1, 5], "rows": 50, "seeds": 2, "distances": [0, 30_000, 100_000]}
    whole = window_svm(runner, SvmTask(tables, tmp_path / "whole", options))
    near, far, none = whole
    assert [row["bin"] for row in whole] == ["0 to 30 kb", "30 to 100 kb", "over 100 kb"]
    assert near["mean"] > 0.8 and far["mean"] > 0.8 and set(near["C"]) <= {1, 5} and len(near["C"]) == 2
    assert near["rows"] + far["rows"] == 72 and np.isnan(none["mean"]) and "too few" in none["note"]
    kept, calls = svm_module.write_atomically, []

    def dying(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        kept(*arguments)

    monkeypatch.setattr(svm_module, "write_atomically", dying)
    with pytest.raises(KeyboardInterrupt):  # after the first fit
        window_svm(runner, SvmTask(tables, tmp_path / "out", options))
    seen: list[object] = []
    monkeypatch.setattr(svm_module, "embed", lambda *arguments: seen.append(arguments))
    assert json.dumps(window_svm(runner, SvmTask(tables, tmp_path / "out", options))) == json.dumps(whole)
    assert not seen and len(calls) == 5  # the windows were there, and so was one of four fits


def test_pairs_of_a_genome_are_those_of_the_sequences(tmp_path: Path) -> None:
    write_random_fasta(tmp_path / "genome.fa", 0, {"chr1": 200})
    genome = "".join((tmp_path / "genome.fa").read_text().upper().split("\n")[1:])
    alt = "A" if genome[99] != "A" else "C"
    (tmp_path / "v.csv").write_text(
        f"chrom,pos,ref,alt,label\n1,100,{genome[99]},{alt},1\n1,100,{alt},G,0\n1,100,{genome[99]},<DEL>,0\n"
    )
    table = PairTable(tmp_path / "v.csv", tmp_path / "genome.fa", 20)
    pair = table.read(0)
    assert pair.ref.tobytes().decode() == genome[89:109] and pair.place == 10
    assert pair.alt.tobytes().decode() == genome[89:99] + alt + genome[100:109]
    with pytest.raises(
        UserError, match=r"v.csv:3: REF is ., but the genome has . there; it may be for another assembly"
    ):
        table.read(1)
    (tmp_path / "w.csv").write_text("chrom,pos,ref,alt,label\n9,100,A,C,1\n")
    with pytest.raises(UserError, match=r"no contig .9., but chr1; it may be another genome$"):
        PairTable(tmp_path / "w.csv", tmp_path / "genome.fa", 20).read(0)
    with pytest.raises(UserError, match=r"v.csv:4: ALT: '<' at base 1 of the sequence is not a base"):
        table.read(2)
    with pytest.raises(UserError, match="has no column 'ref_forward_sequence'; give the genome"):
        PairTable(tmp_path / "v.csv")


def test_mistakes_end_in_one_line(tmp_path: Path) -> None:
    runner, out = Runner(made("ps")), tmp_path / "out"
    files = {
        "label.csv": (
            "sequence,class\nACGT,1\n",
            "no column 'label' or 'labels' for the labels; it has sequence, class",
        ),
        "two.csv": ("sequence,label\nACGT,2\n", "two.csv:2: the label must be 0 or 1, got '2'"),
        "one.csv": ("sequence,label\nACGT,1\nACGT,1\n", "all labels are 1; there are no two classes to compare"),
        "short.csv": ("sequence,label\nAC,1\n", "short.csv:2: the sequence has 2 bases, so it has no base 3"),
        "empty.csv": ("", "holds no line"),
    }
    for name, (content, message) in files.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError) as caught:
            masked(runner, ZeroShot(tmp_path / name, out / name, "auroc", {"places": [3]}))
        assert message in str(caught.value) and "\n" not in str(caught.value), name
    suite = "title: a\nsource: b\nexpects: c\nkind: {kind}\nprotocol: {protocol}\ntasks: {tasks}\n"
    for kind, protocol, tasks, message in (
        ("guess", "{}", "{a: {metric: auroc}}", "kind: choose one of finetune"),
        ("masked", "{rate: 1}", "{a: {metric: auroc}}", "protocol: unknown key 'rate'"),
        ("masked", "{}", "{a: {metric: auroc}}", "a: places is missing"),
        ("masked", "{places: [1]}", "{a: {metric: mcc}}", "a: metric: choose one of auroc"),
        ("variants", "{window: 9}", "{a: {metric: auroc, score: llr}}", "score: choose one of minus_llr"),
        ("variants", "{window: 9}", "{a: {metric: auroc, places: [1]}}", "a: unknown key 'places'"),
    ):
        (tmp_path / "s.yaml").write_text(suite.format(kind=kind, protocol=protocol, tasks=tasks))
        with pytest.raises(UserError) as caught:
            load_suite(tmp_path / "s.yaml")
        assert message in str(caught.value) and "s.yaml" in str(caught.value)


@pytest.mark.moderate
def test_variants_of_a_genome_are_ranked_by_chromosome_and_the_same_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_random_fasta(tmp_path / "genome.fa", 0, {"chr1": 300, "chr2": 300})
    lines = (tmp_path / "genome.fa").read_text().upper().split(">CHR")[1:]
    contigs = {text[0]: "".join(text.split("\n")[1:]) for text in lines}
    rows = [(chrom, pos, n % 2) for n, (chrom, pos) in enumerate((c, p) for c in "12" for p in range(50, 250, 9))]
    refs = [contigs[chrom][pos - 1] for chrom, pos, _ in rows]
    table = {"chrom": [c for c, *_ in rows], "pos": [p for _, p, _ in rows], "ref": refs}
    table["alt"] = ["A" if ref != "A" else "C" for ref in refs]
    table["label"] = [bool(label) for *_, label in rows]
    write_parquet(tmp_path / "data/mendelian_traits_matched_9/test.parquet", table)
    runner, suite = Runner(made("ps")), load_suite("traitgym")
    request = SuiteRequest(tmp_path / "data", None, tmp_path / "genome.fa", {"window": 32})
    real, calls = Parts.finish, []

    def dying(self: Parts, **more: object) -> None:
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(Parts, "finish", dying)
    with pytest.raises(KeyboardInterrupt):
        run_suite(runner, suite, request, tmp_path / "out")
    monkeypatch.setattr(Parts, "finish", real)
    said: list[str] = []
    row, *missing = run_suite(runner, suite, request, tmp_path / "out", said.append)
    assert row["rows"] == len(rows) and row["positives"] == sum(table["label"]) and len(missing) == 3
    assert all("songlab" in one["missing"] for one in missing)
    scores = []
    for (chrom, pos, _), ref, alt in zip(rows, refs, table["alt"], strict=True):
        found = log_p(runner, contigs[chrom][pos - 17 : pos + 15], [16])[16]
        scores.append(found[BASES.index(ref)] - found[BASES.index(alt)])
    expected = ranking("auprc_by_chrom", np.array(table["label"]), np.array(scores), np.array(table["chrom"]))
    assert row["mean"] == pytest.approx(expected, abs=1e-6)
    monkeypatch.setattr("caduceus.evaluate.zero_shot.score_file", None)  # nothing is scored twice
    assert run_suite(runner, suite, request, tmp_path / "out")[0] == row
