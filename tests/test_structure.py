"""Files and functions stay short enough to read: their limits, and where they do not hold."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import LONGEST_FIRST, REPOSITORY

FILE_LINES, FUNCTION_LINES, PARAMETERS = 350, 60, 8
TAKE_OPERANDS = {
    *("selective_scan", "bidirectional_scan", "ssd_scan", "bidirectional_ssd_scan"),
    *("_scan", "_scan_outputs", "_scan_backward", "launch_forward", "launch_backward", "_"),
}
"""Scans as people call them, with the arguments of their definition, and torch's operators and their stand-ins for the
compiler (`_`), whose schemas name each tensor. Everything between takes `ScanOperands`."""
PACKAGES = ("caduceus", "data_prep", "launch", "demo", "benchmarks")


def sources() -> list[Path]:
    made = REPOSITORY / "demo" / "out"  # by `make demo`, with the code that an export brings along
    found = [path for name in PACKAGES for path in sorted((REPOSITORY / name).rglob("*.py"))]
    return [path for path in found if made not in path.parents]


def is_kernel(path: Path) -> bool:
    """Whether a file holds kernels: loops over operands that cannot be cut without cost."""
    return "kernels" in path.stem


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(mark) for mark in node.decorator_list):
            yield node


def parameters(function: ast.FunctionDef) -> int:
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_file_and_its_functions_are_short(path: Path) -> None:
    if is_kernel(path):
        return
    assert len(path.read_text().splitlines()) <= FILE_LINES
    for function in functions(path):
        where = f"{function.name}, line {function.lineno}"
        assert function.end_lineno - function.lineno < FUNCTION_LINES, where
        if "ops" not in path.parts or function.name not in TAKE_OPERANDS:
            assert parameters(function) <= PARAMETERS, where


def test_no_file_of_tests_is_long():
    lengths = {path: len(path.read_text().splitlines()) for path in (REPOSITORY / "tests").rglob("*.py")}
    assert not [str(path.relative_to(REPOSITORY)) for path, lines in lengths.items() if lines > FILE_LINES]


def test_files_that_start_first_are_there():
    assert not [name for name in LONGEST_FIRST if not (REPOSITORY / "tests" / name).is_file()]


@pytest.mark.moderate
def test_what_a_shared_file_system_says_is_asked_patiently():
    """`Path.exists` and its like raise an error that passes, or take it for absence."""
    local = ("caduceus/doctor", "caduceus/ops", "caduceus/hub/auto", "caduceus/commands.py", "caduceus/patience.py")
    for path in sources():
        name = str(path.relative_to(REPOSITORY))
        if name.startswith(("demo", "benchmarks", *local)):
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        asked = [call.func for call in calls if isinstance(call.func, ast.Attribute) and not call.args]
        lines = [call.lineno for call in asked if call.attr in ("exists", "is_file", "is_dir", "stat")]
        assert not lines, name


def test_what_is_bound_to_one_maker_of_gpus_is_on_the_page_of_it():
    page = (REPOSITORY / "docs" / "architecture.md").read_text().split("## Bound to NVIDIA")[1].split("\n## ")[0]
    bound = re.compile(r"""maxnreg|inline_asm|"cuda"|"nccl"|:nccl|nvidia-smi|proc/driver|CUDA_VISIBLE|num_warps""")
    files = {str(path.relative_to(REPOSITORY)) for path in sources() if bound.search(path.read_text())}
    files = {name for name in files if name.startswith(("caduceus", "launch"))}
    assert "caduceus/devices.py" in files
    assert not [name for name in sorted(files) if f"`{name}`" not in page]
