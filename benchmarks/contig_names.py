"""Which share of an assembly's bases `--contigs auto` keeps, for the ways in which assemblies name their contigs.

    python benchmarks/contig_names.py [FILE|FOLDER …]

First come invented assemblies in the naming styles of the public archives, with contigs as long as real ones. Then come
the assemblies of the given files, or of the files in the given folders: FASTA, .2bit, or tables of contig and length
(.chrom.sizes, .fai).
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from caduceus.errors import UserError
from caduceus.tables import read_lines, split_fields, whole_number
from data_prep.genome.genome import open_genome
from data_prep.plan.aliases import AliasTable
from data_prep.plan.contigs import refuse_small_share, select_contigs, share_kept
from data_prep.plan.options import PlanOptions

SEQUENCES = (".fa", ".fa.gz", ".fna", ".fna.gz", ".fasta", ".fasta.gz", ".2bit")
TABLES = (".chrom.sizes", ".fai")
MITOCHONDRION, PLASTID = 16_569, 154_478


@dataclass(frozen=True)
class Assembly:
    """Contigs by length, and the titles of those that have one."""

    name: str
    contigs: dict[str, int]
    titles: dict[str, str] = field(default_factory=dict)


def chromosomes(pattern: str, count: int = 8, longest: int = 60_000_000) -> dict[str, int]:
    """Contigs `pattern` of 1 to `count`, each shorter than the one before."""
    return {pattern.format(number): longest // number for number in range(1, count + 1)}


def scaffolds(pattern: str, count: int = 400, longest: int = 900_000) -> dict[str, int]:
    """Many short contigs."""
    return {pattern.format(number): max(longest // number, 2_000) for number in range(1, count + 1)}


def made_assemblies() -> list[Assembly]:
    """One assembly per naming style."""
    mito_title = "NC_012345.1 Genus species mitochondrion, complete genome"
    lettered = {letter: 4_000_000 - 500_000 * place for place, letter in enumerate("ABCDEF")}
    return [
        Assembly(
            "UCSC, with random, Un and alt",
            chromosomes("chr{}")
            | {"chrX": 50_000_000, "chrY": 9_000_000, "chrM": MITOCHONDRION}
            | scaffolds("chrUn_KI27{:04}v1", 100, 200_000)
            | scaffolds("chr1_KI27{:04}v1_random", 20, 200_000)
            | scaffolds("chr6_GL00{:04}v2_alt", 60, 4_000_000),
        ),
        Assembly(
            "Ensembl", chromosomes("{}") | {"X": 50_000_000, "MT": MITOCHONDRION} | scaffolds("KI270{:03}.1", 100)
        ),
        Assembly(
            "RefSeq, chromosomes",
            chromosomes("NC_0000{:02}.1") | {"NC_012345.1": MITOCHONDRION} | scaffolds("NW_0180{:05}.1"),
            {"NC_012345.1": mito_title},
        ),
        Assembly(
            "RefSeq, scaffolds and a mitochondrion, titled",
            scaffolds("NW_0180{:05}.1") | {"NC_012345.1": MITOCHONDRION},
            {"NC_012345.1": mito_title},
        ),
        Assembly(
            "RefSeq, scaffolds and a mitochondrion, 2bit", scaffolds("NW_0180{:05}.1") | {"NC_012345.1": MITOCHONDRION}
        ),
        Assembly("GenBank CM with JH", chromosomes("CM0010{:02}.2") | scaffolds("JH70{:04}.1")),
        Assembly("GenBank JH alone", scaffolds("JH70{:04}.1")),
        Assembly("GenBank JH, one CM", scaffolds("JH70{:04}.1") | {"CM001001.1": 700_000}),
        Assembly("GenBank, contigs of a project", scaffolds("JAAGKL0100{:05}.1")),
        Assembly("GenArk 2bit, CM and contigs", chromosomes("CM0600{:02}.1") | scaffolds("JAUZXL0100{:05}.1")),
        Assembly("GenArk 2bit, NC, NW", chromosomes("NC_0869{:02}.1") | scaffolds("NW_0272{:05}.1")),
        Assembly("Darwin Tree of Life", chromosomes("SUPER_{}") | scaffolds("scaffold_{}") | {"scaffold_MT": 17_000}),
        Assembly("maker-style scaffolds", scaffolds("maker-scaffold{:05}-size")),
        Assembly("scaffold_N and one contig_1", scaffolds("scaffold_{}") | {"contig_1": 40_000}),
        Assembly("Un_N and MT_1", scaffolds("Un_{}") | {"MT_1": MITOCHONDRION}),
        Assembly("HiC_scaffold_N", chromosomes("HiC_scaffold_{}") | scaffolds("HiC_scaffold_9{:03}")),
        Assembly("chromosomes A to F", lettered),
        Assembly("plant, ChrN, ChrC, ChrM", chromosomes("Chr{}", 5) | {"ChrC": PLASTID, "ChrM": 366_924}),
        Assembly("plant, N, Pt, Mt", chromosomes("{}", 5) | {"Pt": PLASTID, "Mt": 366_924}),
        Assembly("fly, 2L 2R 3L 3R 4 X Y", dict.fromkeys(["2L", "2R", "3L", "3R", "X"], 25_000_000) | {"4": 1_300_000}),
        Assembly("yeast, roman", {f"chr{name}": 900_000 for name in ("I", "II", "III", "IV", "V")} | {"chrM": 85_779}),
        Assembly("titles about mitochondria", scaffolds("ctg{}"), {"ctg1": "ctg1 similar to mitochondrial DNA"}),
        Assembly("mostly alternative versions", {"chr1": 9_000_000} | scaffolds("chr1_GL{:06}v1_alt", 9, 9_000_000)),
    ]


def assemblies_of(path: Path, cache: Path) -> Iterator[Assembly]:
    """The assembly of a file, or those of all files below a folder."""
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if file.name.endswith(SEQUENCES + TABLES):
                yield from assemblies_of(file, cache)
    elif path.name.endswith(TABLES):
        fields = [(number, split_fields(line, tight=2)) for number, line in read_lines(path)]
        yield Assembly(path.name, {row[0]: whole_number(row[1], path, number, "length") for number, row in fields})
    else:
        genome = open_genome(path, cache)
        yield Assembly(path.name, genome.contigs, genome.descriptions)


def row_of(assembly: Assembly) -> list[str]:
    """The assembly's row of the table."""
    options = PlanOptions()
    cells = [assembly.name, f"{len(assembly.contigs):,}", f"{sum(assembly.contigs.values()):,}"]
    try:
        selection = select_contigs(assembly.contigs, assembly.titles, options, AliasTable())
        refuse_small_share(selection, options)
    except UserError as error:
        return [*cells, "refused", str(error).split(";")[0]]
    left_out = ", ".join(f"{len(contigs)} {kind}" for kind, contigs in selection.left_out.items())
    return [*cells, f"{share_kept(selection):.2%}".replace("%", " %"), left_out or "-"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, metavar="FILE|FOLDER", help="real assemblies")
    paths = parser.parse_args().paths
    with tempfile.TemporaryDirectory() as cache:
        real = [assembly for path in paths for assembly in assemblies_of(path, Path(cache))]
        for title, assemblies in (("made", made_assemblies()), ("real", real)):
            if assemblies:
                print(f"| {title} assembly | contigs | bases | kept by default | left out |\n|---|---:|---:|---:|---|")
            for assembly in assemblies:
                print(f"| {' | '.join(row_of(assembly))} |")
            print()


if __name__ == "__main__":
    main()
