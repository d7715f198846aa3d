"""Sends W&B a run's artifacts (`wandb.artifacts`, `wandb.save_code`), and which of them was made from which."""

import json
import re
from pathlib import Path
from typing import Any

import wandb

from caduceus.config import Config
from caduceus.patience import is_file, listed
from caduceus.run.directory import RunDirectory

_ROOT = Path(__file__).resolve().parents[3]
"""The folder that holds the package, which may be a copy."""
_CODE = (".py", ".yaml", ".toml")


def log_artifacts(run: Any, directory: RunDirectory, config: Config, files: bool) -> None:
    """Log the artifacts that the configuration asks for. Raises what W&B's client raises.

    W&B gets references to the shards, and also to checkpoint and export unless `files` is set: then their files are
    sent. The files of manifest, report and code are always sent. W&B shows that the run used the dataset, and made the
    others.
    """
    wanted = config.wandb.artifacts
    datasets = _local_datasets(config) if "dataset" in wanted else []
    for path in datasets:
        dataset = wandb.Artifact(_name(f"dataset-{path.name}"), type="dataset", metadata=_told_of_dataset(path))
        dataset.add_file(str(path / "manifest.json"))
        dataset.add_reference(path.resolve().as_uri(), name="shards", checksum=False)
        (run.log_artifact if run.offline else run.use_artifact)(dataset)  # what is used, a server has to know
    checkpoint = _name(f"checkpoint-{run.id}")
    if "checkpoints" in wanted and (checkpoints := directory.checkpoints()):
        newest = checkpoints[-1]
        facts = {"step": newest.step, "datasets": [_name(f"dataset-{path.name}") for path in _local_datasets(config)]}
        _leave(run, checkpoint, newest.path, newest.step, facts, files)
    exports = listed(directory.path / "export", "step-*")
    if "exports" in wanted and exports:
        step = int(exports[-1].name.removeprefix("step-"))
        facts = {"step": step, "checkpoint": f"{checkpoint}:step-{step}"}
        _leave(run, _name(f"export-{run.id}"), exports[-1], step, facts, files)
    report = directory.path / "report" / "report.html"
    if "report" in wanted and is_file(report):
        page = wandb.Artifact(_name(f"report-{run.id}"), type="report")
        page.add_file(str(report))
        run.log_artifact(page)
    if config.wandb.save_code:
        run.log_code(str(_ROOT / "caduceus"), include_fn=lambda path: path.endswith(_CODE))


def _leave(run: Any, name: str, folder: Path, step: int, facts: dict[str, Any], files: bool) -> None:
    """Log a folder with a model: its files, or a reference to it."""
    model = wandb.Artifact(name, type="model", metadata={**facts, "path": str(folder.resolve())})
    if files:
        model.add_dir(str(folder), name=folder.name)
    else:
        model.add_reference(folder.resolve().as_uri(), name=folder.name, checksum=False)
    run.log_artifact(model, aliases=["latest", f"step-{step}"])


def _told_of_dataset(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        return {"fingerprint": manifest.get("fingerprint"), "species": [one.get("name") for one in manifest["species"]]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _local_datasets(config: Config) -> list[Path]:
    entries = config.data.path if isinstance(config.data.path, list) else [config.data.path]
    paths = [entry["path"] if isinstance(entry, dict) else entry for entry in entries]
    return [Path(path) for path in paths if isinstance(path, str) and is_file(Path(path) / "manifest.json")]


def _name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)
