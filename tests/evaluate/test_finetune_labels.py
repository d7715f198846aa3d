"""Fine-tuning on several labels, labels by base, places of a genome, and folders of benchmarks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from caduceus.alphabet import reverse_complement
from caduceus.errors import UserError
from caduceus.evaluate.classifier import Cnn, HeadOnly, SequenceModel
from caduceus.evaluate.columns import read_columns
from caduceus.evaluate.embed import EmbedOptions, embed
from caduceus.evaluate.examples import ExampleLoader, Examples, WithLoss, label_tensors
from caduceus.evaluate.finetune import finetune
from caduceus.evaluate.labelled import LabelledTable, Task, find_task
from caduceus.evaluate.labelled_sources import LabelledSource, tables_of
from caduceus.evaluate.metrics import measure
from caduceus.evaluate.model import Runner
from caduceus.evaluate.predict import Predictor
from caduceus.hub import load
from tests.conftest import write_random_fasta
from tests.evaluate.conftest import made
from tests.evaluate.test_finetune import gc_rich, options


def bases_of(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8)


@pytest.mark.moderate
def test_each_of_several_labels_is_learnt(tmp_path: Path) -> None:
    tables = {}
    for seed, (name, count) in enumerate((("train", 80), ("test", 40))):
        rng = np.random.default_rng(seed)
        lines = ["sequence,gc,a_rich"]
        for _ in range(count):
            gc, a_rich = int(rng.integers(2)), int(rng.integers(2))
            text = gc_rich(rng, gc)
            lines.append(f"{text.replace('T', 'A') if a_rich else text.replace('A', 'T')},{gc},{a_rich}")
        (tmp_path / f"{name}.csv").write_text("\n".join(lines) + "\n")
        tables[name] = LabelledTable(tmp_path / f"{name}.csv", label="gc,a_rich")
    runner = Runner(made("ph", torch.float32))
    result = finetune(runner, tables, tmp_path / "out", options(probe=True, baselines=("kmer",), fit={"epochs": 8}))
    assert result["task"]["classes"] == ["gc", "a_rich"] and result["task"]["several"]
    for method in ("full", "probe", "kmer"):
        assert result["summary"][method]["auroc"]["mean"] > 0.7, method
    predictor = Predictor(tmp_path / "out" / "model")
    test = tables["test"].labelled(predictor.model.task)
    outputs = predictor.predict(test.bases)
    assert outputs.shape == (40, 2) and measure(predictor.model.task, test.labels, outputs) == pytest.approx(
        result["results"]["full"][0]["test"], abs=1e-6
    )
    written = read_columns(tmp_path / "out" / "predictions.tsv").values
    chosen = [";".join(n for n, p in zip(("gc", "a_rich"), row, strict=True) if p >= 0.5) or "." for row in outputs]
    assert written["prediction"] == chosen and set(written["label"]) <= {"gc", "a_rich", "gc;a_rich", "."}


def test_names_parted_by_semicolons_are_the_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("sequence,x,y\nAC,1,0\nAG,1,1\nAT,0,0\n")
    (tmp_path / "b.csv").write_text("sequence,label\nAC,x\nAG,y;x\nAT,.\n")
    tables = LabelledTable(tmp_path / "a.csv", label="x,y"), LabelledTable(tmp_path / "b.csv")
    tasks = [find_task(table, "multilabel") for table in tables]
    assert tasks[0] == tasks[1] == Task(("x", "y"), several=True)
    labels = [table.labelled(task).labels for table, task in zip(tables, tasks, strict=True)]
    assert np.array_equal(*labels) and labels[0].tolist() == [[1, 0], [1, 1], [0, 0]]


def write_by_base(path: Path, seed: int, count: int, letters: bool) -> LabelledTable:
    """The label of a base says whether it is G or C; a dot is no label."""
    rng, lines = np.random.default_rng(seed), ["sequence\tlabel"]
    for _ in range(count):
        text = gc_rich(rng, 0.5)
        strong = [base in "GC" for base in text]
        label = "".join("sw"[not one] for one in strong) if letters else " ".join(str(3 + 2 * one) for one in strong)
        lines.append(f"{text}\t{'.' + label[1:]}")
    path.write_text("\n".join(lines) + "\n")
    return LabelledTable(path)


@pytest.mark.moderate
@pytest.mark.parametrize(
    ("letters", "frozen"),
    [
        (True, False),
        pytest.param(False, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_labels_of_bases_are_learnt_and_predicted(letters: bool, frozen: bool, tmp_path: Path) -> None:
    given = {name: write_by_base(tmp_path / f"{name}.tsv", n, 24, letters) for n, name in enumerate(("train", "test"))}
    runner = Runner(made("ph", torch.float32))
    chosen = options(task="per-base", frozen=frozen, baselines=("cnn",), fit={"epochs": 6, "lr": 0.05, "batch_size": 4})
    result = finetune(runner, given, tmp_path / "out", chosen)
    metric = "auroc" if letters else "pearson"
    assert result["summary"]["cnn"][metric]["mean"] > 0.95
    assert result["summary"][chosen.main][metric]["mean"] > (0.6 if frozen else 0.95)
    predictor = Predictor(tmp_path / "out" / "model")
    test = given["test"].labelled(predictor.model.task)
    outputs = predictor.predict(test.bases)
    written = read_columns(tmp_path / "out" / "predictions.tsv").values
    assert len(outputs) == len(written["prediction"]) == sum(map(len, test.bases))
    assert written["label"][0] == ("." if letters else "") and written["position"][:2] == ["0", "1"]
    column = outputs[:, 0] if letters else outputs
    assert np.array(written["p_s" if letters else "prediction"], dtype=float) == pytest.approx(column, abs=1e-5)
    turned = predictor.predict([reverse_complement(test.bases[0])])
    assert turned[::-1] == pytest.approx(outputs[: len(test.bases[0])], abs=1e-5)
    assert load(tmp_path / "out" / "model").config == runner.config


@pytest.mark.parametrize("kind", ["ps", "ph"])
def test_a_base_gives_the_same_whatever_is_beside_its_sequence(kind: str) -> None:
    rng, task = np.random.default_rng(0), Task(("a", "b"), per_base=True)
    sequences = [bases_of(gc_rich(rng, 0.5)[:n]) for n in (5, 30, 12)]
    runner = Runner(made(kind))
    model, cnn = SequenceModel(runner.model, task, "mean").double().eval(), Cnn(task).double().eval()
    with torch.no_grad():
        for net in (model, cnn):
            together = net(sequences)
            for row, bases in enumerate(sequences):
                alone = net([bases])[0]
                assert together[row, : len(bases)].numpy() == pytest.approx(alone.numpy(), abs=1e-12)
                turned = net([reverse_complement(bases)])[0].flip(0)
                assert turned.numpy() == pytest.approx(alone.numpy(), abs=1e-12)
        features = embed(runner, sequences, EmbedOptions(pool="base", strands="concatenate"))
        frozen = HeadOnly(model.head)(features)
        assert frozen[2, :12].numpy() == pytest.approx(model(sequences)[2, :12].numpy(), abs=1e-12)


def test_losses_are_those_of_their_definition() -> None:
    outputs = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    task = Task(("a", "b"), per_base=True)
    labels, weights = label_tensors(task, [np.array([0.0, 1, -1]), np.array([1.0, 1])], np.array([1.0, 3]))
    assert weights.tolist() == [[1, 3, 0], [3, 3, 0]]

    class Fixed(torch.nn.Module):
        def forward(self, inputs: list) -> torch.Tensor:
            return outputs

    losses = WithLoss(Fixed(), task)([0, 0], labels, weights)
    log_p = outputs.log_softmax(-1)
    assert losses.loss_sum.tolist() == pytest.approx(
        [-float(log_p[0, 0, 0] + 3 * log_p[0, 1, 1]), -3 * float(log_p[1, 0, 1] + log_p[1, 1, 1])], abs=1e-12
    )
    assert losses.weight_sum.tolist() == [4, 6]


def test_augmentation_shows_either_strand_and_turns_labels_with_it() -> None:
    sequences = [bases_of("AACGT"[n % 5 :] + "ACC") for n in range(40)]
    labels = [np.arange(len(bases), dtype=float) for bases in sequences]
    task = Task(None, per_base=True)
    loader = ExampleLoader(
        Examples(sequences, labels, list(map(len, sequences))), task, 40, 1000, 3, torch.device("cpu"), augment=True
    )
    turned = 0
    for batch in (next(iter(loader)), next(iter(loader))):
        for bases, label, row in zip(batch.inputs, batch.labels, batch.g.tolist(), strict=True):
            same = np.array_equal(bases, sequences[row])
            assert same or np.array_equal(bases, reverse_complement(sequences[row]))
            expected = labels[row] if same else labels[row][::-1]
            assert label[: len(bases)].tolist() == expected.tolist()
            turned += not same
    assert 20 < turned < 60


def test_places_of_a_genome_are_labelled_by_their_names_or_a_bigwig(tmp_path: Path) -> None:
    bigwig = pytest.importorskip("pyBigWig")
    write_random_fasta(tmp_path / "g.fa", 0, {"chr1": 500})
    genome = "".join((tmp_path / "g.fa").read_text().upper().split("\n")[1:])
    (tmp_path / "r.bed").write_text("1\t10\t30\tgene\n1\t40\t60\tother\n1\t100\t120\tgene\n")
    with bigwig.open(str(tmp_path / "s.bw"), "w") as file:
        file.addHeader([("chr1", 500)])
        file.addEntries("chr1", [10, 20, 44], values=[1.0, 3.0, 7.0], span=10)
    files = {"train": tmp_path / "r.bed", "valid": None, "test": None}
    columns = ("sequence", "label", None)

    def rows(name: str, **given: object) -> dict:
        source = LabelledSource(genome=tmp_path / "g.fa", **given)
        return read_columns(tables_of(files, source, columns, tmp_path / name)["train"].path).values

    assert rows("a") == {
        "sequence": [genome[10:30], genome[40:60], genome[100:120]],
        "label": ["gene", "other", "gene"],
    }
    signal = {"bigwig": tmp_path / "s.bw"}
    assert rows("b", **signal) == {"sequence": [genome[10:30], genome[40:60]], "label": [2.0, 7.0]}
    assert rows("c", **signal, signal="max", window=8)["label"] == [3.0, 7.0]
    by_base = rows("d", **signal, task="per-base")
    assert by_base["label"][1] == [None] * 4 + [7.0] * 10 + [None] * 6
    task = find_task(LabelledTable(tmp_path / "d.data/train.parquet"), "per-base")
    assert task.per_base and task.mean == pytest.approx((10 + 30 + 70) / 30)
    (tmp_path / "s.bw").write_bytes(b"no bigwig")
    for given, message in (
        ({"genome": None}, "names places of a genome; give its file with --genome"),
        ({"bigwig": tmp_path / "s.bw"}, "s.bw is not a bigWig file"),
        ({"bigwig": tmp_path / "none.bw"}, "none.bw: no such file"),
        ({"signal": "sum"}, "--signal: choose one of mean, max"),
    ):
        with pytest.raises(UserError) as caught:
            tables_of(files, LabelledSource(**{"genome": tmp_path / "g.fa", **given}), columns, tmp_path / "e")
        assert message in str(caught.value)


def test_fasta_and_folders_of_benchmarks_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "x.fna").write_text(">a|1\nAC\nGT\n>b|0\nGGGG\n")
    columns = ("sequence", "label", None)
    files = {"train": tmp_path / "x.fna", "valid": None, "test": None}
    table = tables_of(files, LabelledSource(), columns, tmp_path / "out")["train"]
    assert read_columns(table.path).values == {"sequence": ["ACGT", "GGGG"], "label": ["1", "0"]}
    (tmp_path / "tf").mkdir()
    for name in ("train", "dev", "test"):
        (tmp_path / "tf" / f"{name}.csv").write_text(f"sequence,label\nACGT,{name}\n")
    found = tables_of({"train": tmp_path / "tf"}, LabelledSource(), columns, tmp_path / "out")
    assert {split: table.path.name for split, table in found.items()} == {
        "train": "train.csv", "valid": "dev.csv", "test": "test.csv",
    }  # fmt: skip
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no train split"):
        tables_of({"train": tmp_path / "empty"}, LabelledSource(), columns, tmp_path / "out")


@pytest.mark.moderate
def test_mistakes_end_in_one_line(tmp_path: Path, model_folder, refused) -> None:
    files = {
        "a.csv": ("sequence,x,y\nAC,1,2\nAC,0,1\n", ["--label", "x,y"], "a.csv:2: y must be 0 or 1, got '2'"),
        "b.csv": ("sequence,label\nACG,ab\nACG,abb\n", ["--task", "per-base"], "b.csv:2: labels per base must be num"),
        "c.csv": ("sequence,label\nACG,aba\nACG,ab\n", ["--task", "per-base"], "c.csv:3: 2 labels for a sequence of 3"),
        "d.csv": ("sequence,label\nACG,aaa\nACG,aaa\n", ["--task", "per-base"], "all labels are 'a'"),
        "e.csv": ("sequence,label\nACG,x\nACG,x\n", ["--task", "multilabel"], "name fewer than two classes"),
        "f.csv": ("sequence,label\nACG,aba\nACG,bab\n", ["--task", "per-base", "--probe"], "--probe, --baseline kmer"),
        "g.txt.zip": ("", [], "its ending does not say what it holds"),
        "g.2bit": ("", [], "known are .csv, .tsv, .txt, .tab, .parquet, .pq, .fa, .fasta, .fna, .ffn, .bed,"),
        "h.bed": ("chr1\t0\t3\n", [], "names places of a genome; give its file with --genome"),
        "i.fa": (">a\nACG\n", [], "the header has no label after a |"),
    }
    for name, (content, more, message) in files.items():
        (tmp_path / name).write_text(content)
        words = ["finetune", "--model", model_folder("ps"), "--train", tmp_path / name, "--out", tmp_path / "out"]
        assert message in refused(*words, *more), name
    (tmp_path / "good.csv").write_text("sequence,label\nACG,0\nACC,1\nAGG,0\nTTT,1\n")
    words = ["finetune", "--model", model_folder("ps"), "--train", tmp_path / "good.csv", "--out", tmp_path / "out"]
    assert "a Caduceus-PS conjoins strands" in refused(*words, "--strands", "augment")
    assert "--strands: choose one of auto" in refused(*words, "--strands", "both")
    assert "--lora: must be a rank of at least 1" in refused(*words, "--lora", -1)
    assert not (tmp_path / "out").exists()


def test_odd_tables_are_read_as_their_makers_meant(tmp_path: Path) -> None:
    task = Task(("0", "1"))
    plain = LabelledTable(tmp_path / "plain.csv")
    (tmp_path / "plain.csv").write_text("sequence,label\nACGT,0\nTTGA,1\n")
    expected = [bases.tobytes() for bases in plain.labelled(task).bases]
    for name, content in {
        "bom.csv": b"\xef\xbb\xbfsequence,label\nACGT,0\nTTGA,1\n",
        "crlf.csv": b"sequence,label\r\nACGT,0\r\nTTGA,1\r\n",
        "lower.csv": b"sequence,label\nacgt,0\nttga,1\n",
        "rna.csv": b"sequence,label\nACGU,0\nuuga,1\n",
        "spaces.tsv": b"sequence label\nACGT  0\nTTGA 1 \n",
        "semicolon free.tsv": b"sequence\tlabel\nACGT\t0\nTTGA\t1\n\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        found = LabelledTable(tmp_path / name).labelled(task)
        assert [bases.tobytes() for bases in found.bases] == expected and found.labels.tolist() == [0, 1], name
