from pathlib import Path

import pytest

from caduceus.config import (
    CaduceusConfig,
    Config,
    config_from_dict,
    config_to_dict,
    load_config,
    save_config,
    stages_of,
)
from caduceus.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "model" / "small.yaml").write_text("model:\n  d_model: 32\n  rcps: true\n")
    path = tmp_path / "pretrain" / "run.yaml"
    path.write_text("defaults:\n- model/small\nmodel:\n  n_layer: 2\ntrain:\n  lr: 1e-3\n")
    return path


def test_defaults_own_keys_and_overrides_apply_in_this_order(preset: Path) -> None:
    config = load_config(preset, ["model.d_model=64", "train.betas=[0.8,0.9]", "data.path=shards"])
    assert (config.model.d_model, config.model.n_layer, config.model.rcps) == (64, 2, True)
    assert (config.train.lr, config.train.betas, config.data.path) == (1e-3, [0.8, 0.9], "shards")
    assert (config.run.name, config.run.dir) == ("run", "runs/run")


@pytest.mark.moderate
def test_a_saved_configuration_loads_as_itself(preset: Path, tmp_path: Path) -> None:
    config = load_config(preset, ["data.path=[{path: a, weight: 2}]", "train.warmup_steps=7"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.stesp=3", "train.stesp"),
        ("trian.steps=3", "trian"),
        ("train.steps=many", "train.steps"),
        ("train.steps=0", "train.steps"),
        ("train.lr=fast", "train.lr"),
        ("train=3", "train"),
        ("model.d_model=0", "model.d_model"),
        ("model.vocab_size=13", "model.vocab_size: choose one of 12, 8"),
        ("model.mixer=mamba3", "model.mixer: choose one of mamba, mamba2"),
        ("model.bidirectional_strategy=mean", "model.bidirectional_strategy"),
        ("train.precision=fp8", "train.precision"),
        ("parallel.zero_stage=5", "parallel.zero_stage: choose one of 0, 1, 2, 3"),
        ("data.mask_prob=1.5", "data.mask_prob"),
        ("data.random_token_prob=0.3", "data.random_token_prob"),
        ("data.objective=next_base", "data.objective"),
        ("train.global_batch=9", "train.global_batch"),
        ("train.betas=[0.9]", "train.betas"),
        ("train.betas=[.nan,0.9]", "train.betas"),
        ("train.lr=nan", "train.lr: must be a finite number"),
        ("train.lr=inf", "train.lr: must be a finite number"),
        ("train.clip_norm=nan", "train.clip_norm"),
        ("train.stall_minutes=nan", "train.stall_minutes"),
        ("run.time_budget_minutes=inf", "run.time_budget_minutes"),
        ("train.spike_factor=0.5", "train.spike_factor: must be 0 (off) or above 1"),
        ("train.seed=-1", "train.seed"),
        ("model.norm_epsilon=-1", "model.norm_epsilon"),
        ("model.norm_epsilon=nan", "model.norm_epsilon"),
        ("run.allow_change=[foo.bar]", "run.allow_change: there is no key 'foo.bar'"),
        ("train.warmup_steps=1000000", "train.warmup_steps"),
        ("train.min_lr=1", "train.min_lr"),
        ("train.steps", "key.path=value"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(preset: Path, override: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(preset, [override])
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


STAGES = "train.stages=[{seq_len: 64, steps: 3}, {seq_len: 128, steps: 4, lr: 2e-3}]"


@pytest.mark.moderate
def test_stages_are_changed_by_number_and_have_the_steps_of_the_run(preset: Path, tmp_path: Path) -> None:
    config = load_config(preset, [STAGES, "train.stages.2.steps=9", "data.seq_len=32", "train.lr=1e-3"])
    first, second = stages_of(config)
    assert (config.train.steps, first.config.train.steps, second.config.train.steps) == (12, 3, 9)
    assert (first.config.data.seq_len, first.config.train.lr, first.config.train.seed) == (64, 1e-3, 0)
    assert (second.config.data.seq_len, second.config.train.lr, second.config.train.seed) == (128, 2e-3, 1)
    assert not first.is_last and second.is_last and second.bases_of_a_step == 8 * 128
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert load_config(tmp_path / "config.yaml", ["train.stages.1.steps=1"]).train.steps == 10


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("train.stages.3.steps=1", "change a stage by its number (1 to 2), such as train.stages.1.steps=1000"),
        ("train.stages.x.steps=1", "change a stage by its number (1 to 2)"),
        ("train.stages.1.setps=1", "unknown key 'train.stages.1.setps'; known here: seq_len, "),
        ("train.stages.1.lr=fast", "could not be converted"),
        ("train.stages.2.seq_len=0", "train.stages: stage 2: data.seq_len: must be at least 1"),
        ("train.stages.2.micro_batch=3", "train.stages: stage 2: train.global_batch: 8 is not a multiple"),
        ("train.stages.2.min_lr=1", "train.stages: stage 2: train.min_lr: 1.0 is above train.lr 0.002"),
        ("train.stages=[{steps: 1}, {lr: 1}]", "train.stages: stage 2 has no steps"),
        ("train.stages=3", "train.stages"),
        ("train.steps=8", "train.steps: 8, but the stages of train.stages have 7"),
        ("train.decay_from=x", "train.decay_from: does not go with train.stages"),
    ],
)
def test_a_mistake_in_a_stage_is_one_line_that_names_it(preset: Path, override: str, named: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(preset, [STAGES, override])
    assert named in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train: [1\n", "YAML"),
        ("- 1\n", "mapping"),
        ("defaults: [model/absent]\n", "model/absent"),
        ("defaults: [pretrain/run]\n", "circle"),
        ("modle: {}\n", "modle"),
    ],
)
def test_a_bad_file_is_refused_by_name(preset: Path, text: str, named: str) -> None:
    preset.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(preset)
    assert named in str(caught.value) and str(preset) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no configuration file"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize("sharing", [["parallel.context=2"], ["parallel.strands=2", "model.rcps=true"]])
def test_ranks_that_share_a_sequence_read_no_stream(preset: Path, sharing: list[str]) -> None:
    with pytest.raises(UserError, match=r"^data\.mode: stream goes with neither .*; use data\.mode=shards$"):
        load_config(preset, ["data.mode=stream", *sharing])


@pytest.mark.parametrize("path", sorted((CONFIGS / "pretrain").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_loads_and_keeps_the_published_batch(path: Path) -> None:
    config = load_config(path)
    assert config.model != CaduceusConfig() or "256" in path.stem or "1k" in path.stem
    if path.stem.startswith(("ph-", "ps-", "mamba-")):
        assert all(stage.bases_of_a_step == 2**20 for stage in stages_of(config))
        assert config.train.betas == [0.9, 0.95] and config.train.weight_decay == 0.1


def test_defaults_are_the_published_recipe() -> None:
    config = Config()
    assert (config.train.lr, config.train.min_lr, config.train.clip_norm) == (8e-3, 1e-4, 1.0)
    assert (config.data.mask_prob, config.data.mask_token_prob, config.data.random_token_prob) == (0.15, 0.8, 0.1)


@pytest.mark.moderate
def test_the_key_async_is_a_word_of_python_and_still_a_key(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("checkpoint:\n  async: false\n")
    config = load_config(tmp_path / "run.yaml")
    assert config.checkpoint.async_ is False and config_to_dict(config)["checkpoint"]["async"] is False
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert load_config(tmp_path / "run.yaml", ["checkpoint.async=true"]).checkpoint.async_ is True
    with pytest.raises(UserError, match=r"checkpoint\.async: .*maybe.*bool"):
        load_config(tmp_path / "run.yaml", ["checkpoint.async=maybe"])
    with pytest.raises(UserError, match=r"unknown key 'checkpoint\.async_'; known here: .*async"):
        load_config(tmp_path / "run.yaml", ["checkpoint.async_=true"])


@pytest.mark.parametrize("backend", ["triton", "mamba_ssm"])
def test_double_precision_is_refused_for_backends_without_it(preset: Path, backend: str) -> None:
    with pytest.raises(UserError, match=rf"^train\.precision: ops\.backend={backend} does not .* fp64; use naive"):
        load_config(preset, [f"ops.backend={backend}", "train.precision=fp64"])
    assert load_config(preset, ["train.precision=fp64"]).ops.backend == "auto"


@pytest.mark.moderate
def test_a_file_of_the_name_of_a_preset_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("ps-1k").model.d_model == 256
    assert (load_config("ps-1k").run.name, load_config("ps-1k").run.dir) == ("ps-1k", "runs/ps-1k")
    (tmp_path / "ps-1k").write_text("model: {d_model: 32}\n")
    assert load_config("ps-1k").model.d_model == 32
    with pytest.raises(UserError, match=r"^ps-2k: there is no configuration file and no preset .* --config list"):
        load_config("ps-2k")


def test_a_folder_of_a_presets_name_does_not_hide_it(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("demo").run.name == "demo"
