"""Text tables as tools write them: read alike, or refused in one line with file and line."""

import csv
import gzip
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from caduceus.bed import read_bed
from caduceus.errors import UserError
from caduceus.tables import is_missing, read_lines, read_table, split_fields, whole_number
from tests.data_prep.genome_files import bgzip

ROWS = [(1, "a\tb"), (2, "c d"), (4, "e")]
TEXT = "a\tb\nc d\n \t\ne\n"
ENCODED = {
    "plain": TEXT.encode(),
    "no last line end": TEXT.rstrip().encode(),
    "CR LF": TEXT.replace("\n", "\r\n").encode(),
    "CR": TEXT.replace("\n", "\r").encode(),
    "byte order mark": b"\xef\xbb\xbf" + TEXT.encode(),
    "UTF-16": TEXT.encode("utf-16"),
    "UTF-16, big end first": b"\xfe\xff" + TEXT.encode("utf-16-be"),
    "gzip": gzip.compress(TEXT.encode()),
    "gzip of two members": gzip.compress(TEXT[:4].encode()) + gzip.compress(TEXT[4:].encode()),
    "bgzip": bgzip(TEXT[:4].encode()) + bgzip(TEXT[4:].encode()),
    "gzip with bytes behind it": gzip.compress(TEXT.encode()) + b"index of a tool",
    "a mark by each of two tools": b"\xef\xbb\xbf\xef\xbb\xbf" + TEXT.encode(),
    "gzip of a byte order mark": gzip.compress(b"\xef\xbb\xbf" + TEXT.encode()),
    "joined files with marks": b"\xef\xbb\xbfa\tb\n\xef\xbb\xbfc d\n\n\xef\xbb\xbfe\n",
}


@pytest.mark.parametrize("case", ENCODED)
def test_lines_are_the_same_however_they_are_written(tmp_path: Path, case: str) -> None:
    path = tmp_path / "table"
    path.write_bytes(ENCODED[case])
    assert read_lines(path) == ROWS


def test_characters_within_a_field_end_no_line(tmp_path: Path) -> None:
    path = tmp_path / "table"
    path.write_text("chr1\t1\t9\ta\x0cb\x85c\u2028d\n", encoding="utf-8")
    assert read_lines(path) == [(1, "chr1\t1\t9\ta\x0cb\x85c\u2028d")]


REFUSED = {
    "truncated gzip": (gzip.compress(b"a\tb\n" * 99)[:-9], r"table: truncated gzip; download it again"),
    "bgzip cut between blocks": (bgzip(b"a\tb\n", eof=False), r"table: truncated \(the end marker of bgzip is"),
    "bgzip cut behind others": (bgzip(b"a\tb\n") + bgzip(b"c\td\n", eof=False), r"table: truncated \(the end marker"),
    "damaged gzip": (gzip.compress(b"a\tb\n" * 99)[:-8] + bytes(8), r"table: damaged gzip"),
    "spreadsheet": (b"PK\x03\x04 and more", r"table: is a zip archive or a spreadsheet, not a text table"),
    "plain rows behind gzip": (
        gzip.compress(b"a\tb\n") + b"c\td\n",
        r"table: plain text follows the gzip data",
    ),
    "bzip2 in gzip": (gzip.compress(b"BZh91AY"), r"table: is a bzip2 file"),
    "Latin-1": (b"a\tb\n# S\xf8ren\n", r"table:2: is not UTF-8 text"),
    "half UTF-16": (b"\xff\xfea", r"table:1: is not UTF-16-LE text"),
    "binary": (b"a\nb\nc\0d\n", r"table:3: holds binary data"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    path = tmp_path / "table"
    path.write_bytes(REFUSED[case][0])
    with pytest.raises(UserError, match=REFUSED[case][1]) as raised:
        read_lines(path)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_lines(tmp_path)


def test_fields_are_parted_at_tabs_or_at_both_where_they_are_mixed() -> None:
    assert split_fields("a b\tc d", tight=0) == ["a b", "c d"]
    assert split_fields(" a \tb\t \t c ") == ["a", "b", "", "c"]
    assert split_fields("a\tb c\td") == ["a", "b", "c", "d"]
    assert split_fields("chr1\t1\t9\tmy gene\t0", tight=3) == ["chr1", "1", "9", "my gene", "0"]
    assert split_fields("chr1\t1 9\tgene", tight=3) == ["chr1", "1", "9", "gene"]
    assert split_fields("chr1 1 9", tight=3) == ["chr1", "1", "9"]


@pytest.mark.parametrize("text", ["6_4", "+0", "-1", "٦٤", "１２", "1e5", "1.0", "1,000", "0x10", "", " 7"])
def test_numbers_are_plain_digits(text: str) -> None:
    with pytest.raises(UserError, match=r"^t\.bed:7: start must be a whole number in plain digits, got "):
        whole_number(text, "t.bed", 7, "start")
    assert whole_number("0064", "t.bed", 7, "start") == 64


def test_missing_values() -> None:
    assert all(map(is_missing, ("", " ", "na", "NA", "N/A", "NaN", ".", "-", "None")))
    assert not any(map(is_missing, ("0", "NAD", "chr1", "nano")))


BED = {
    "plain": "chr1\t0\t9\nchr2\t5\t8\n",
    "blanks": "chr1 0 9\nchr2  5   8\n",
    "tabs and blanks": "chr1\t0 9\nchr2 5\t8 \n",
    "browser and track": "browser position chr1:1-9\nbrowser\thide all\ntrack\ntrack name=x\nchr1\t0\t9\nchr2\t5\t8\n",
    "headings": "chrom start end\nchr1\t0\t9\nchr2\t5\t8\n",
    "headings of UCSC": "#chrom\tchromStart\tchromEnd\tname\nchr1\t0\t9\nchr2\t5\t8\n",
    "headings without a mark": "chrom\tchromStart\tchromEnd\nchr1\t0\t9\nchr2\t5\t8\n",
    "other words": "#contig\tbegin\tend\ncontig\tbegin\tend\nchr1\t0\t9\nchr2\t5\t8\n",
    "headings of R": "seqnames\tstart\tend\twidth\nchr1\t0\t9\t9\nchr2\t5\t8\t3\n",
    "joined files with headings": "chrom\tstart\tstop\nchr1\t0\t9\nchrom\tstart\tstop\nchr2\t5\t8\n",
    "indented comments": "  # comment\nchr1\t0\t9\nchr2\t5\t8\n",
    "more columns": "chr1\t0\t9\t.\t1\t+\nchr2\t5\t8\t.\t2\t-\n",
    "CR LF and a last blank line": "chr1\t0\t9\r\nchr2\t5\t8\r\n\r\n",
}


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("case", BED)
def test_bed_as_tools_write_it(tmp_path: Path, case: str, mark: bytes) -> None:
    path = tmp_path / "rows.bed"
    path.write_bytes(mark + BED[case].encode())
    rows = [(row.contig, row.start, row.end) for row in read_bed(path).rows]
    assert rows == [("chr1", 0, 9), ("chr2", 5, 8)]
    assert [row.name or "." for row in read_bed(path).rows] in ([".", "."], ["9", "3"])


def test_rows_of_zero_length_are_counted_and_names_may_hold_blanks(tmp_path: Path) -> None:
    path = tmp_path / "rows.bed"
    path.write_text("chr1\t7\t7\nchr1\t0\t9\tmy gene\nchr1\t9\t9\n")
    bed = read_bed(path)
    assert [row.name for row in bed.rows] == ["my gene"] and bed.empty_rows == [1, 3]


@pytest.mark.moderate
@given(st.binary(max_size=120) | st.text("ab\t\r\n ,\ufeff", max_size=80).map(str.encode))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any"
    path.write_bytes(content)
    try:
        lines = read_lines(path)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert all(text.strip() and number >= 1 for number, text in lines)


def test_lines_serve_readers_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "table.csv.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbfsequence,label\r\nACGT,1\r\n"))
    assert list(csv.DictReader(text for _, text in read_lines(path))) == [{"sequence": "ACGT", "label": "1"}]


@pytest.mark.parametrize("mark", ["\t", ",", ";", "  "])
def test_a_table_is_separated_as_its_headings_are(tmp_path: Path, mark: str) -> None:
    path = tmp_path / "table.txt"
    path.write_text("".join(mark.join(row) + "\n" for row in (["sequence", "label"], ["ACGT", "1"], ["GGTT", "0"])))
    table = read_table(path)
    assert (table.headings, table.rows) == (["sequence", "label"], [["ACGT", "1"], ["GGTT", "0"]])
    path.write_text(f"sequence{mark}label\nACGT\n")
    with pytest.raises(UserError, match=r"table\.txt:2: has 1 fields"):
        read_table(path)
