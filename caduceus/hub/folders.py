"""Folders that hold a model: runs and their checkpoints, imports, and published checkpoints.

A published checkpoint is a directory with `config.json` and `model.safetensors`, with the names of the repository
kuleshov-group/caduceus; an export also has tokenizer, card and code, with which `transformers` loads it. An import has
`config.yaml` (the `model:` section) and `model.safetensors` (this package's names).
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from caduceus.config import load_config
from caduceus.errors import UserError
from caduceus.files import replacing_directory
from caduceus.hub.auto.code import AUTO_MAP
from caduceus.hub.card import CARD, model_card
from caduceus.hub.checkpoint import PUBLISHED_CONFIG, load_published
from caduceus.hub.published import to_published
from caduceus.hub.remote_code import remote_code
from caduceus.hub.tokenizer_files import TOKENIZER_FILE, tokenizer_files
from caduceus.hub.weights import WEIGHTS, read_safetensors
from caduceus.model.heads import CaduceusForMaskedLM
from caduceus.patience import exists, is_directory, is_file, listed
from caduceus.run.checkpoints import AVERAGE, MARKER
from caduceus.run.directory import RunDirectory

OWN_CONFIG = "config.yaml"

_log = logging.getLogger(__name__)

PUBLISHED_CODE = "kuleshov-group/caduceus-ps_seqlen-131k_d_model-256_n_layer-16"
"""Repository of the Hugging Face hub with the published code."""


def load(path: str | Path) -> CaduceusForMaskedLM:
    """The model of a run directory (its newest valid checkpoint), of one of its checkpoints, of an export or another
    published checkpoint (see `load_published`), or of an import. Raises `UserError`, which names the file or key, for
    anything that does not fit.
    """
    return _load_own(Path(path)) if is_own(path) else load_published(path)


def is_own(path: str | Path) -> bool:
    """Whether `path` is a run, a checkpoint of one, or an import; other folders are published checkpoints."""
    return any(exists(Path(path) / name) for name in (MARKER, OWN_CONFIG))


def save_published(
    model: CaduceusForMaskedLM,
    directory: str | Path,
    source: str | Path | None = None,
    *,
    published_code: bool = False,
    published_tokens: bool = False,
) -> None:
    """Write a published checkpoint with tokenizer, code and model card; `directory` appears when complete.

    An earlier one in `directory` is replaced. Raises `UserError` for a directory with other files. `source`: the run or
    checkpoint of the model, whose data and losses the card then shows. With `published_code` no code is written, and
    the configuration refers to that of the published repository. With `published_tokens` the tokenizer encodes N and
    ends sequences as in the published training, which differs from what models trained here see.
    """
    config, state_dict = to_published(model)
    code = {} if published_code else remote_code()
    repository = PUBLISHED_CODE if published_code else None
    auto_map = AUTO_MAP
    if repository is not None:
        auto_map = {name: f"{repository}--{place}" for name, place in AUTO_MAP.items() if "Token" not in name}
    mode = "published" if published_tokens else "plain"
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    about = {"architectures": ["CaduceusForMaskedLM"], "auto_map": auto_map, "torch_dtype": dtype}
    # Keys are not sorted: published code takes the values of complement_map in the order of the file.
    values = dict(sorted({"model_type": "caduceus", **about, **config}.items()))
    texts = {
        **code,
        **tokenizer_files(model.config.vocabulary, mode, repository),
        PUBLISHED_CONFIG: json.dumps(values, indent=2) + "\n",
        CARD: _card(model, source),
    }
    with _new_directory(directory, {*remote_code(), *texts, TOKENIZER_FILE, WEIGHTS}) as writing:
        save_file(state_dict, writing / WEIGHTS, metadata={"format": "pt"})
        for name, text in texts.items():
            (writing / name).write_text(text)


def _card(model: CaduceusForMaskedLM, source: str | Path | None) -> str:
    """The model card, with facts about the run of `source`."""
    if source is None or not is_own(source):
        return model_card(model.config)
    run, checkpoints = run_of(source), []
    if is_file(Path(source) / MARKER):
        checkpoints = [found for found in run.checkpoints() if found.path.samefile(source)]
    return model_card(model.config, run, checkpoints[0].step if checkpoints else None)


def run_of(path: str | Path) -> RunDirectory:
    """The run `path`, or the run that the checkpoint `path` belongs to."""
    path = Path(path)
    return RunDirectory.open(path.resolve().parents[1] if is_file(path / MARKER) else path)


def _load_own(path: Path) -> CaduceusForMaskedLM:
    if is_file(path / MARKER):
        weights, config_path = path, run_of(path).config_path
    elif is_file(path / WEIGHTS):
        weights, config_path = path, path / OWN_CONFIG
    else:
        run = run_of(path)
        checkpoint = run.newest_valid_checkpoint()
        if checkpoint is None:
            raise UserError(f"{path}: this run has no complete checkpoint yet")
        weights, config_path = checkpoint.path, run.config_path
    model = CaduceusForMaskedLM(load_config(config_path).model)
    try:
        if is_file(weights / WEIGHTS):
            state = read_safetensors(weights / WEIGHTS)
        else:
            state = model.state_dict()
            _read_checkpoint(weights, state)
        model.load_state_dict(state)
    except (RuntimeError, ValueError, dcp.CheckpointException) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{weights}: not a checkpoint of the model in {config_path} ({reason})") from None
    return model


def _read_checkpoint(path: Path, state: dict[str, Tensor]) -> None:
    """Fill `state` with the weights of a checkpoint, or with their average over steps where the run kept one."""
    held = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    averages = {name: {AVERAGE: state[name]} for name in state if f"optimizer.state.{name}.{AVERAGE}" in held}
    if averages:
        _log.info("%s: these weights are the averages over steps (train.ema)", path)
    wanted = {"model": {name: tensor for name, tensor in state.items() if name not in averages}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a warning that this is a single process
        dcp.load({**wanted, "optimizer": {"state": averages}}, checkpoint_id=path, no_dist=True)


def save_imported(model: CaduceusForMaskedLM, directory: str | Path) -> None:
    """Write a model in this package's layout: `config.yaml` (the `model:` section) and `model.safetensors`."""
    with _new_directory(directory, {OWN_CONFIG, WEIGHTS}) as writing:
        save_file(model.state_dict(), writing / WEIGHTS)
        OmegaConf.save(OmegaConf.create({"model": asdict(model.config)}), writing / OWN_CONFIG)


@contextmanager
def _new_directory(directory: str | Path, files: set[str]) -> Iterator[Path]:
    """A temporary directory that becomes `directory` at the end, and may replace one that holds only `files`."""
    directory = Path(directory)
    if is_file(directory):
        raise UserError(f"{directory}: is a file; choose a directory")
    if is_directory(directory):
        others = sorted(path.name for path in listed(directory) if path.name not in files)
        if others:
            raise UserError(f"{directory}: holds other files, such as {others[0]}; choose a new directory")
    try:
        with replacing_directory(directory) as writing:
            yield writing
    except (OSError, SafetensorError) as error:
        raise UserError(f"{directory}: could not be written ({error})") from None
