"""What README, CONTRIBUTING and docs say of the code is so: files, keys, options, names, targets of make, times."""

import re
from pathlib import Path

import pytest

from caduceus.config import load_config
from caduceus.config.run import KEYS
from caduceus.presets import preset
from caduceus.train.estimate import estimate
from tests.conftest import REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
FOLDERS = ("caduceus", "data_prep", "launch", "configs", "demo", "tests", "benchmarks", "docs")
SECTIONS = {key.split(".")[0] for key in KEYS}
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


@pytest.fixture(scope="module")
def code() -> str:
    """All of the program's own text."""
    files = [path for name in FOLDERS[:5] for path in (REPOSITORY / name).rglob("*") if path.suffix in (".py", ".yaml")]
    return "\n".join(path.read_text() for path in files)


def quoted(page: Path) -> set[str]:
    """What stands between backticks, outside of blocks."""
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)))


@each_page
def test_files_that_a_page_names_are_there(page: Path) -> None:
    named = [text for text in quoted(page) if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]*", text)]
    missing = [path for path in named if not (REPOSITORY / path).exists() and not path.startswith("demo/out/")]
    assert missing == []


@each_page
def test_keys_that_a_page_names_are_there(page: Path) -> None:
    named = re.findall(rf"`((?:{'|'.join(SECTIONS)})\.[a-z_]+)[`=:]", page.read_text())
    files = ("py", "json", "fna", "safetensors")
    assert [key for key in named if key not in KEYS and key.split(".")[1] not in files] == []


@each_page
def test_options_that_a_page_names_are_there(page: Path, code: str) -> None:
    foreign = {"--shm-size"}  # docker's
    named = {match[1] for text in quoted(page) if (match := re.match(r"(--[a-z][\w-]*)", text))} - foreign
    field = (option[2:].replace("-", "_") for option in named)
    assert [
        option for option, name in zip(named, field, strict=True) if f'"{option}"' not in code and name not in code
    ] == []


@pytest.mark.moderate
def test_names_that_the_architecture_gives_are_those_of_the_code(code: str) -> None:
    named = [text for text in quoted(REPOSITORY / "docs" / "architecture.md") if re.fullmatch(r"_?[A-Za-z]\w+", text)]
    assert len(named) > 30
    assert [name for name in named if not re.search(rf"\b{name}\b", code)] == []


def test_what_the_walks_name_is_defined_in_the_file_that_they_name() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    pairs = re.findall(r"`(\w+)`\s+(?:in\s+|\()`([\w/]+\.py)`", text)
    assert len(pairs) > 15
    where = {name: (REPOSITORY / path).read_text() for name, path in pairs}
    missing = [name for name, code in where.items() if not re.search(rf"^(def |class |){name}\b", code, re.MULTILINE)]
    assert missing == []


@each_page
def test_targets_of_make_that_a_page_names_are_there(page: Path) -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    named = re.findall(r"(?:`|^\$ )make ([\w-]+)", page.read_text(), re.MULTILINE)
    assert [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


@pytest.mark.moderate
def test_the_times_of_the_readme_are_those_of_the_model_and_said_to_be() -> None:
    text = (REPOSITORY / "README.md").read_text()
    rows = re.findall(r"^\|.*\| `([\w-]+)` \| [\d,]+ \| [\d,]+ \| ([\d.]+ \w+) \| ([\d.]+ \w+) \|$", text, re.MULTILINE)
    assert {name for name, *_ in rows} == {"ps-1k-118", "ps-1k", "ps-32k", "ps-131k", "ps-1m"}
    for name, *shown in rows:
        config = load_config(preset("pretrain", name))
        for gpus, told in zip((1, 8), shown, strict=True):
            time, unit = told.split()
            seconds = estimate(config, gpus).step_seconds * config.train.steps
            assert float(time) * {"min": 60, "h": 3600}[unit] == pytest.approx(seconds, rel=0.1), (name, gpus)
    assert "**The times are a model's.** They are computed, not measured" in text


def test_every_page_is_reached_from_the_readme() -> None:
    linked = re.findall(r"\]\((docs/[\w-]+\.md)[)#]", (REPOSITORY / "README.md").read_text())
    assert {path.name for path in (REPOSITORY / "docs").glob("*.md")} == {Path(target).name for target in linked}


@each_page
def test_the_first_paragraph_of_a_page_says_what_it_is_for(page: Path) -> None:
    """A sentence about the page, or in README about the model."""
    first = page.read_text().split("\n\n")[1]
    assert re.match(r"This page |\*\*Caduceus\*\* is |`make demo` trains ", first), first
