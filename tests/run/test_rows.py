"""Files of JSON lines read from their end."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caduceus.run import rows
from caduceus.run.rows import cut_after, lines_from_end, newest_rows


def write(path: Path, content: list[dict[str, Any]], torn: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content) + torn)
    return path


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 90), max_size=12), block=st.integers(1, 70), torn=st.sampled_from(["", '{"st', "\n"])
)
def test_from_the_end_all_rows_come_whatever_the_blocks(
    tmp_path_factory: Any, sizes: list[int], block: int, torn: str
) -> None:
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    content = [{"step": step, "text": "x" * size} for step, size in enumerate(sizes)]
    write(path, content, torn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "_BLOCK", block)
        found = list(lines_from_end(path))
    assert [line.row for line in found] == content[::-1]
    text = path.read_bytes()
    assert all(json.loads(text[line.begin : line.end]) == line.row for line in found)


def test_rows_of_a_kind_are_found_between_others_and_only_near_the_end(tmp_path: Path) -> None:
    content = [{"step": step, ("valid_loss" if step % 10 == 0 else "loss"): 1.0} for step in range(100)]
    path = write(tmp_path / "metrics.jsonl", content, '{"step": 100, "valid_loss": 1.')
    assert [row["step"] for row in newest_rows(path, "valid_loss", 3)] == [70, 80, 90]
    assert [row["step"] for row in newest_rows(path, "loss", 2)] == [98, 99]
    end = next(lines_from_end(path, "valid_loss")).begin
    assert [row["step"] for row in newest_rows(path, "valid_loss", 1, end)] == [80]
    assert list(lines_from_end(path, "valid_loss", reach=200)) == []
    assert newest_rows(tmp_path / "absent", "loss", 1) == []


@pytest.mark.parametrize(("step", "kept"), [(5, 11), (50, 101), (0, 1), (99, 199), (1000, 199)])
def test_a_cut_leaves_the_rows_up_to_a_step_and_no_torn_line(tmp_path: Path, step: int, kept: int) -> None:
    content = [{"step": 0}, *({"step": step, name: 1} for step in range(1, 100) for name in ("loss", "valid_loss"))]
    path = write(tmp_path / "metrics.jsonl", content, '{"step": 3')
    cut_after(path, step)
    assert path.read_text() == "".join(json.dumps(row) + "\n" for row in content[:kept])
    cut_after(path, -1)
    assert path.read_bytes() == b""
    cut_after(tmp_path / "absent", 3)
    assert not (tmp_path / "absent").exists()


def test_a_cut_reads_and_writes_what_is_new_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "metrics.jsonl", [{"step": step, "text": "x" * 200} for step in range(20_000)])
    inode, read = path.stat().st_ino, []
    parsed = rows._parsed
    monkeypatch.setattr(rows, "_parsed", lambda line: read.append(line) or parsed(line))
    cut_after(path, 19_950)
    assert len(read) == 50 and path.stat().st_ino == inode
