"""Embeddings equal a slow computation of each sequence by itself, whatever the file, the batch and the piece."""

import gzip
import itertools
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from caduceus import CaduceusForMaskedLM
from caduceus.alphabet import reverse_complement
from caduceus.evaluate import embed as embed_module
from caduceus.evaluate.embed import EmbedOptions, embed, embed_file
from caduceus.evaluate.model import Runner
from caduceus.evaluate.sequences import SequenceSource
from tests.conftest import write_random_fasta
from tests.evaluate.conftest import made

LENGTHS = (30, 30, 7, 1, 55, 90)
SEQUENCES = ["".join(np.random.default_rng(n).choice(list("ACGTN"), n)) for n in LENGTHS]


@torch.no_grad()
def slow(model: CaduceusForMaskedLM, text: str, layer: int, strands: str) -> np.ndarray:
    """(L, D), or with concatenated strands (L, 2 D)."""

    def states(bases: np.ndarray) -> torch.Tensor:
        ids = torch.from_numpy(model.config.vocabulary.encode(bases).astype(np.int64))[None]
        return model(ids, output_hidden_states=True).hidden_states[layer][:, 0]

    bases = np.frombuffer(text.encode(), np.uint8)
    both = list(states(bases))
    if not model.config.rcps:
        both += [one.flip(0) for one in states(reverse_complement(bases))]
    if strands == "concatenate":
        return torch.cat(both, -1).numpy()
    return (both[0] if strands == "forward" else (both[0] + both[1]) / 2).numpy()


POOLED = {
    "mean": lambda rows: rows.mean(0),
    "centre": lambda rows: rows[len(rows) // 2],
    "middle:3:20": lambda rows: rows[max(len(rows) // 2 - 3, 0) : len(rows) // 2 + 20].mean(0),
    "base": lambda rows: rows,
}


@pytest.mark.parametrize(
    "kind, options",
    [
        ("ps", {}),
        ("ps", {"piece": 40}),
        ("ps", {"batch_bases": 60, "layer": 1}),
        ("ps_unfused", {}),
        ("ph", {"piece": 40, "batch_bases": 1}),
        ("ph", {"batch_bases": 60}),
        ("mamba", {}),
        ("plantcad2", {"batch_bases": 60}),
    ],
)
def test_each_sequence_is_embedded_as_by_itself(kind: str, options: dict[str, int]) -> None:
    model = made(kind)
    layer = options.get("layer", -1)
    if kind == "ps_unfused" and layer == -1:
        layer = options["layer"] = 0  # its hidden states end before the final norm
    pools = ("base", "concatenate"), ("base", "forward"), ("mean", "average"), ("centre", "average")
    for pool, strands in (*pools, ("middle:3:20", "concatenate")):
        found = embed(Runner(model), SEQUENCES, EmbedOptions(pool=pool, strands=strands, **options))
        for vector, text in zip(found, SEQUENCES, strict=True):
            expected = POOLED[pool](slow(model, text, layer, strands))
            assert np.abs(vector - expected).max() <= 1e-12 * np.abs(expected).max()


def test_a_place_is_one_of_each_sequence() -> None:
    model = made("ph")
    found = embed(Runner(model), SEQUENCES, EmbedOptions(pool="0"))
    for vector, text in zip(found, SEQUENCES, strict=True):
        assert vector == pytest.approx(slow(model, text, -1, "average")[0], rel=1e-12)


def test_the_largest_value_is_taken_on_each_strand() -> None:
    model = made("ps")
    found = embed(Runner(model), SEQUENCES, EmbedOptions(pool="max", strands="concatenate", piece=20))
    for vector, text in zip(found, SEQUENCES, strict=True):
        assert vector == pytest.approx(slow(model, text, -1, "concatenate").max(0), rel=1e-12)


@pytest.mark.parametrize("kind", ["ps", "ph"])
def test_a_reverse_complement_has_the_same_mean(kind: str) -> None:
    text = SEQUENCES[-1]
    other = reverse_complement(np.frombuffer(text.encode(), np.uint8)).tobytes().decode()
    found = embed(Runner(made(kind)), [text, other])
    assert found[0] == pytest.approx(found[1], rel=1e-10)


@pytest.fixture
def genome(tmp_path: Path) -> Path:
    write_random_fasta(tmp_path / "genome.fa", 3, {"chr1": 400, "chr2": 90})
    return tmp_path / "genome.fa"


def bases(genome: Path, contig: int, start: int, end: int) -> str:
    text = "".join(genome.read_text().split(">")[contig].split("\n")[1:]).upper()
    return "N" * max(-start, 0) + text[max(start, 0) : end] + "N" * max(end - len(text), 0)


def write_inputs(folder: Path, genome: Path) -> dict[str, tuple[Path, list[str], dict]]:
    """Kind -> file, the sequences in it, and the options that it takes."""
    texts = SEQUENCES[:4]
    lines = ["id,sequence"] + [f"{n},{text}" for n, text in enumerate(texts)]
    (folder / "t.csv").write_text("\n".join(lines))
    windows = "\ufeff" + "\r\n".join(lines).replace(",", "\t").lower().replace("t\n", "u\n")
    (folder / "t.tsv.gz").write_bytes(gzip.compress(windows.encode()))
    pyarrow.parquet.write_table(pyarrow.table({"Sequence": texts}), folder / "t.parquet")
    (folder / "r.bed").write_text("1\t5\t25\n# a comment\nchr2\t80\t90\tend\n")
    ref = bases(genome, 1, 99, 101)
    (folder / "v.vcf").write_text(f"##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\nchr1\t100\t.\t{ref}\tT,<DEL>\n")
    about = {"genome": genome, "window": 20}
    return {
        "fasta": (genome, [bases(genome, 1, 0, 400), bases(genome, 2, 0, 90)], {}),
        "csv": (folder / "t.csv", texts, {}),
        "tsv": (folder / "t.tsv.gz", texts, {}),
        "parquet": (folder / "t.parquet", texts, {}),
        "bed": (folder / "r.bed", [bases(genome, 1, 5, 25), bases(genome, 2, 80, 90)], {"genome": genome}),
        "bed with windows": (folder / "r.bed", [bases(genome, 1, 5, 25), bases(genome, 2, 75, 95)], about),
        "vcf": (
            folder / "v.vcf",
            [bases(genome, 1, 89, 109), bases(genome, 1, 89, 99) + "T" + bases(genome, 1, 101, 110)],
            about,
        ),
    }


@pytest.mark.parametrize("case", ["fasta", "csv", "tsv", "parquet", "bed", "bed with windows", "vcf"])
def test_a_file_is_embedded_as_its_sequences(case: str, tmp_path: Path, genome: Path) -> None:
    path, texts, options = write_inputs(tmp_path, genome)[case]
    runner = Runner(made("ps"))
    embed_file(runner, SequenceSource(path, **options), tmp_path / "out.npz", EmbedOptions(piece=100))
    with np.load(tmp_path / "out.npz") as found:
        assert len(found["names"]) == len(texts)
        assert np.array_equal(found["embeddings"], embed(runner, texts, EmbedOptions(piece=100)))
    assert (tmp_path / "out.npz.json").is_file() and not (tmp_path / "out.npz.parts").exists()


def test_vectors_of_bases_are_found_by_sequence_in_both_formats(tmp_path: Path, genome: Path) -> None:
    path, texts, _ = write_inputs(tmp_path, genome)["csv"]
    runner, options = Runner(made("ph")), EmbedOptions(pool="base")
    expected = embed(runner, texts, options)
    for name in ("out.npz", "out.parquet"):
        embed_file(runner, SequenceSource(path), tmp_path / name, options)
    with np.load(tmp_path / "out.npz") as found:
        offsets = found["offsets"]
        parts = [found["embeddings"][i:j] for i, j in itertools.pairwise(offsets)]
    rows = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    for number, vectors in enumerate(expected):
        assert np.array_equal(parts[number], vectors)
        mine = [row for row in rows if row["name"] == str(number)]
        assert [row["position"] for row in mine] == list(range(len(vectors)))
        assert np.array_equal([row["embedding"] for row in mine], vectors)


def test_tracks_of_bases_are_found_by_sequence_in_zarr(tmp_path: Path, genome: Path) -> None:
    zarr = pytest.importorskip("zarr", reason="of the extra `evaluate`")
    path, texts, _ = write_inputs(tmp_path, genome)["csv"]
    runner, options = Runner(made("ph")), EmbedOptions(pool="base")
    for _ in range(2):  # the second time in the place of the first
        embed_file(runner, SequenceSource(path), tmp_path / "out.zarr", options)
    found = zarr.open_group(str(tmp_path / "out.zarr"), mode="r")
    offsets = found["offsets"][:]
    assert list(found.attrs["names"]) == [str(number) for number in range(len(texts))]
    for number, vectors in enumerate(embed(runner, texts, options)):
        assert np.array_equal(found["embeddings"][offsets[number] : offsets[number + 1]], vectors)
    embed_file(runner, SequenceSource(path), tmp_path / "means.zarr", EmbedOptions())
    assert np.array_equal(zarr.open_group(str(tmp_path / "means.zarr"))["embeddings"][:], embed(runner, texts))


@pytest.mark.moderate
@pytest.mark.parametrize("window", [None, 700])
def test_shards_are_embedded_as_their_windows(tmp_path: Path, small_shards: Path, window: int | None) -> None:
    runner, options = Runner(made("ps")), EmbedOptions(pool="centre", piece=1000)
    embed_file(runner, SequenceSource(small_shards, window=window), tmp_path / "out.npz", options)
    records = (small_shards.parent / "genome.fa").read_text().split(">")
    text = "".join(records[3].split("\n")[1:]).upper()  # chr3, which is held out
    cuts = [(at, min(at + 2048, len(text))) for at in range(0, len(text), 2048)]
    cuts = [(at, min(at + (window or 2048), end)) for first, end in cuts for at in range(first, end, window or 2048)]
    with np.load(tmp_path / "out.npz") as found:
        assert found["names"].tolist() == [f"small/chr3:{first}-{end}" for first, end in cuts]
        assert np.array_equal(found["embeddings"], embed(runner, [text[first:end] for first, end in cuts], options))


def test_a_command_that_was_killed_goes_on(tmp_path: Path, genome: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, texts, _ = write_inputs(tmp_path, genome)["csv"]
    monkeypatch.setattr(embed_module, "_PART_SEQUENCES", 1)
    runner, real, calls = Runner(made("ps")), embed, []

    def dying(runner: Runner, sequences: list, options: EmbedOptions) -> np.ndarray:
        calls.append(len(sequences))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(runner, sequences, options)

    monkeypatch.setattr(embed_module, "embed", dying)
    with pytest.raises(KeyboardInterrupt):
        embed_file(runner, SequenceSource(path), tmp_path / "out.npz", EmbedOptions())
    assert not (tmp_path / "out.npz").exists()
    embed_file(runner, SequenceSource(path), tmp_path / "out.npz", EmbedOptions())
    assert len(calls) == len(texts) + 1  # the one that died is the only one to be made twice
    with np.load(tmp_path / "out.npz") as found:
        assert np.allclose(found["embeddings"], real(runner, texts), rtol=1e-12)


def test_parts_of_other_options_are_not_taken(tmp_path: Path, genome: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, texts, _ = write_inputs(tmp_path, genome)["csv"]
    monkeypatch.setattr(embed_module, "write_embeddings", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    runner = Runner(made("ps"))
    with pytest.raises(KeyboardInterrupt):
        embed_file(runner, SequenceSource(path), tmp_path / "out.npz", EmbedOptions())
    monkeypatch.undo()
    embed_file(runner, SequenceSource(path), tmp_path / "out.npz", EmbedOptions(layer=0))
    with np.load(tmp_path / "out.npz") as found:
        assert np.array_equal(found["embeddings"], embed(runner, texts, EmbedOptions(layer=0)))


@pytest.mark.moderate
def test_mistakes_end_in_one_line(tmp_path: Path, genome: Path, small_shards: Path, model_folder, refused) -> None:
    vcf = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\n"
    other = "A" if bases(genome, 1, 99, 100) != "A" else "C"
    files = {
        "empty.csv": ("", "holds no line"),
        "rows.csv": ("sequence\n", "the table has no row"),
        "column.csv": ("name,dna\na,ACGT\n", "no column 'sequence' for the sequences (--column); it has name, dna"),
        "gap.csv": ("sequence\nACGT\nAC-GT\n", "gap.csv:3: '-' at base 3 of the sequence is not a base"),
        "hole.csv": ("id,sequence\n1,\n", "hole.csv:2: the sequence is empty"),
        "uneven.csv": (
            "id,sequence\n1,A,C\n",
            "uneven.csv:2: has 3 fields separated by commas, but the table has 2 headings",
        ),
        "twice.csv": ("a,a\n1,2\n", "two columns are named 'a'"),
        "t.xlsx": ("", "known are .fa, .fasta, .fna, .ffn, .2bit, .bed,"),
        "contig.bed": ("chr9\t1\t5\n", "the genome has no contig 'chr9', but chr1, chr2"),
        "far.bed": ("chr1\t1\t500\n", "ends at 500, beyond chr1 with 400 bases"),
        "none.bed": ("# nothing\n", "holds no sequence"),
        "other.vcf": (f"{vcf}chr1\t100\t.\t{other}\tG\n", f"REF is {other}, but the genome has"),
        "no.vcf": ("chr1\t100\t.\tA\tG\n", "not a VCF"),
        "p.parquet": ("not parquet", "not readable as parquet"),
    }
    for name, message in {
        "--split": "choose one of train, valid, test",
        "--input": "holds no sequence of the split",
    }.items():
        words = ["embed", "--model", model_folder("ps"), "--input", small_shards, "--out", tmp_path / "out.npz"]
        assert message in refused(*words, "--split", "test" if name == "--input" else "dev"), name
    assert "manifest" in refused("embed", "--model", model_folder("ps"), "--input", tmp_path, "--out", "out.npz")
    model = model_folder("ps")
    for name, (content, message) in files.items():
        (tmp_path / name).write_text(content)
        words = ["embed", "--model", model, "--input", tmp_path / name, "--out", tmp_path / "out.npz"]
        words += ["--genome", genome] if name.endswith((".bed", ".vcf")) else []
        words += ["--window", "20"] if name.endswith(".vcf") else []
        assert message in refused(*words), name
    (tmp_path / "good.csv").write_text("sequence\nACGT\n")
    good = ["embed", "--model", model, "--input", tmp_path / "good.csv", "--out", tmp_path / "out.npz"]
    for words, message in {
        ("--pool", "median"): "--pool: choose one of mean, max, centre, middle:BEFORE:AFTER, base, a place",
        ("--pool", "middle:0:0"): "--pool: middle:0:0 contains no base",
        ("--pool", "4"): "0 has 4 bases, so it has no base 4",
        ("--layer", "3"): "--layer: the model has 0 (embedding) to 2 (final norm), got 3",
        ("--strands", "both"): "--strands: choose one of",
        ("--piece", "0"): "--piece: must be at least 1",
        ("--out", "x.txt"): "should end in .npz, .parquet or .zarr",
        ("--model", "nowhere"): "nowhere",
        ("--input", "nowhere.fa"): "nowhere.fa: no such file",
    }.items():
        assert message in refused(*good, *words), words
    assert not list(tmp_path.glob("out.npz*"))
