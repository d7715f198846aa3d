"""The code that exports bring along: without this package, offline, in the oldest and the newest transformers."""

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from caduceus import hub
from caduceus.hub.remote_code import remote_code
from tests.hub.test_folders import call
from tests.model.golden import DIRECTORY, load_golden

OLDEST = ("transformers==4.46.1", "tokenizers==0.20.3", "huggingface_hub<1")
SCRIPT = Path(__file__).with_name("use_export.py")


@pytest.fixture(scope="module")
def oldest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the oldest transformers; all else is what these tests run with."""
    directory = tmp_path_factory.mktemp("oldest")
    venv.create(directory, with_pip=False, symlinks=True)
    packages = next(directory.glob("lib/python*/site-packages"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", "--target"]
    command += [str(packages), *OLDEST]  # of thousands of modules, an export uses few
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"the oldest transformers cannot be had here: {done.stderr.strip().splitlines()[-1]}")
    here = [sysconfig.get_paths()["purelib"], *(path for path in sys.path if path.endswith("site-packages"))]
    (packages / "here.pth").write_text("\n".join(dict.fromkeys(here)))
    return directory / "bin" / "python"


def use(python: Path | str, name: str, tmp_path: Path) -> dict:
    golden = load_golden(name)
    hub.save_published(hub.from_published(golden.config, golden.part("state")), tmp_path / "export")
    arguments = [tmp_path / "export", DIRECTORY / f"{name}.safetensors", tmp_path / "cache", tmp_path / "out"]
    done = subprocess.run(
        [str(python), str(SCRIPT), *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path, timeout=800
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(seen: dict, name: str) -> None:
    plantcad = "mamba2" in name
    assert seen["logits"] < 1e-5 and seen["loss"] < 1e-5
    assert seen["parameters"] == (25608 if plantcad else 16000) and seen["pointers"]
    assert seen["tokens"] == ([3, 4, 5, 1, 6, 2] if plantcad else [7, 8, 9, 3, 10, 4])
    assert seen["modules"] == "transformers_modules"
    assert seen["heads"] == ["Caduceus", "CaduceusForSequenceClassification", "CaduceusForTokenClassification"]
    assert seen["trained"] == 10 and seen["comes back"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ps_fused", "ps_mamba2_fused"])
def test_the_oldest_transformers_uses_an_export(oldest, name, tmp_path):
    seen = use(oldest, name, tmp_path)
    assert seen["version"] == "4.46.1"
    check(seen, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ps_mamba2_fused"])
def test_the_newest_transformers_uses_an_export(name, tmp_path):
    check(use(sys.executable, name, tmp_path), name)


def test_the_code_is_the_packages_own_and_imports_nothing_of_it():
    files = remote_code()
    assert {"configuration_caduceus.py", "modeling_caduceus.py", "tokenization_caduceus.py"} <= files.keys()
    for name, text in files.items():
        compile(text, name, "exec")
        assert "import caduceus" not in text and "from caduceus" not in text
        imported = {line.split()[1][1:] for line in text.splitlines() if line.lstrip().startswith("from .")}
        assert {f"{module}.py" for module in imported} <= files.keys()


@pytest.mark.moderate
def test_published_code_and_tokens_can_be_named_instead(tmp_path, capsys):
    for name, tokenizer in (("ps_fused", "CaduceusTokenizer"), ("plantcad1_ps_fused", "PreTrainedTokenizerFast")):
        golden, folder = load_golden(name), tmp_path / name
        hub.save_imported(hub.from_published(golden.config, golden.part("state")), folder)
        out = ("--out", str(tmp_path / "export"))
        assert call(capsys, "export", "--run", str(folder), "--published-code", *out)[0] == 0
        assert not list((tmp_path / "export").glob("*.py"))
        config = json.loads((tmp_path / "export" / "config.json").read_text())
        assert config["auto_map"]["AutoModelForMaskedLM"].startswith("kuleshov-group/caduceus")
        assert "AutoModelForTokenClassification" not in config["auto_map"]
        told = json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())
        assert told["tokenizer_class"] == tokenizer
    from transformers import AutoTokenizer

    fast = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert fast("ACgtNN[MASK]A")["input_ids"] == [3, 4, 5, 6, 2, 2, 1, 3]
    imported = str(tmp_path / "ps_fused")
    assert call(capsys, "export", "--run", imported, "--published-tokens", *out)[0] == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "export")("AN")["input_ids"] == [7, 11, 1]


@pytest.mark.slow
def test_importing_the_package_does_not_import_transformers():
    program = "import sys, caduceus.hub; assert 'transformers' not in sys.modules\n"
    program += "from transformers import AutoConfig; print(AutoConfig.for_model('caduceus').__class__.__module__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "caduceus.hub.auto.configuration_caduceus", done.stderr
