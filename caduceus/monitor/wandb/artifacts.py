"""What a run leaves in W&B besides rows, by `wandb.artifacts` and `wandb.save_code`, and what came of what."""

import re
from pathlib import Path
from typing import Any

import wandb

from caduceus.config import Config
from caduceus.run.directory import RunDirectory

_ROOT = Path(__file__).resolve().parents[3]
"""The folder that holds the package, which may be a copy."""
_CODE = (".py", ".yaml", ".toml")


def log_artifacts(run: Any, directory: RunDirectory, config: Config) -> None:
    """Give the W&B run what the configuration asks for; raises what W&B's client raises.

    Shards and checkpoints stay where they are, and W&B gets references to them; manifest, report and code come whole.
    """
    wanted = config.wandb.artifacts
    if "dataset" in wanted:
        for path in _local_datasets(config):
            dataset = wandb.Artifact(_name(f"dataset-{path.name}"), type="dataset")
            dataset.add_file(str(path / "manifest.json"))
            dataset.add_reference(path.resolve().as_uri(), name="shards", checksum=False)
            (run.log_artifact if run.offline else run.use_artifact)(dataset)  # what is used, a server has to know
    checkpoints = directory.checkpoints()
    if "checkpoints" in wanted and checkpoints:
        newest = checkpoints[-1]
        model = wandb.Artifact(_name(f"checkpoint-{run.id}"), type="model", metadata={"step": newest.step})
        model.add_reference(newest.path.resolve().as_uri(), name=newest.path.name, checksum=False)
        run.log_artifact(model, aliases=["latest", f"step-{newest.step}"])
    report = directory.path / "report" / "report.html"
    if "report" in wanted and report.is_file():
        page = wandb.Artifact(_name(f"report-{run.id}"), type="report")
        page.add_file(str(report))
        run.log_artifact(page)
    if config.wandb.save_code:
        run.log_code(str(_ROOT / "caduceus"), include_fn=lambda path: path.endswith(_CODE))


def _local_datasets(config: Config) -> list[Path]:
    entries = config.data.path if isinstance(config.data.path, list) else [config.data.path]
    paths = [entry["path"] if isinstance(entry, dict) else entry for entry in entries]
    return [Path(path) for path in paths if isinstance(path, str) and (Path(path) / "manifest.json").is_file()]


def _name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "-", text)
