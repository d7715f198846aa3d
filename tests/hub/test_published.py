"""Conversion between our model and the published configuration and state dict."""

import pytest
import torch

from caduceus import CaduceusConfig, CaduceusForMaskedLM
from caduceus.errors import UserError
from caduceus.hub import from_published, to_published
from caduceus.hub.published import config_from_published

EMBEDDING = "caduceus.backbone.embeddings.word_embeddings.embedding.weight"
MIXER = "caduceus.backbone.layers.1.mixer.submodule"


def test_round_trip_is_exact(golden):
    config, state_dict = to_published(from_published(golden.config, golden.part("state")))
    assert config_from_published(config) == from_published(golden.config, golden.part("state")).config
    if golden.config["vocab_size"] == 12:  # the others tell of their initialisation too
        assert config == golden.config
    given = {"mixer": "mamba2", "dt_rank": "auto", **golden.config, **golden.config["ssm_cfg"]}  # and initialisation
    assert {**config, **config["ssm_cfg"], "ssm_cfg": given["ssm_cfg"]}.items() <= given.items()
    expected = golden.part("state")
    assert state_dict.keys() == expected.keys()
    for name, tensor in expected.items():
        assert state_dict[name].dtype == tensor.dtype and torch.equal(state_dict[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_round_trip_keeps_the_precision(golden_ps, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in golden_ps.part("state").items()}
    _, state_dict = to_published(from_published(golden_ps.config, state))
    for name, tensor in state.items():
        assert state_dict[name].dtype == tensor.dtype and torch.equal(state_dict[name], tensor), name


def test_exported_tensors_share_no_memory(golden_ps):
    model = from_published(golden_ps.config, golden_ps.part("state"))
    _, state_dict = to_published(model)
    pointers = [t.data_ptr() for t in (*state_dict.values(), *model.state_dict().values())]
    assert len(set(pointers)) == len(pointers)


def test_published_hub_configuration_is_read():
    """Like the config.json of a published checkpoint: padded vocabulary, initialisation keys, transformers keys."""
    published = {
        "_name_or_path": "x",
        "architectures": ["CaduceusForMaskedLM"],
        "auto_map": {"AutoConfig": "configuration_caduceus.CaduceusConfig"},
        "bidirectional": True,
        "bidirectional_strategy": None,
        "bidirectional_weight_tie": True,
        "complement_map": {str(i): {7: 10, 8: 9, 9: 8, 10: 7}.get(i, i) for i in range(16)},
        "d_model": 256,
        "fused_add_norm": True,
        "initializer_cfg": {"initializer_range": 0.02, "n_residuals_per_layer": 1, "rescale_prenorm_residual": True},
        "model_type": "caduceus",
        "n_layer": 16,
        "norm_epsilon": 1e-05,
        "pad_token_id": -100,
        "pad_vocab_size_multiple": 8,
        "rcps": True,
        "residual_in_fp32": False,
        "rms_norm": True,
        "ssm_cfg": {"bias": False, "conv_bias": True, "d_conv": 4, "d_state": 16, "dt_rank": "auto", "dt_scale": 1.0},
        "torch_dtype": "float32",
        "transformers_version": "4.38.1",
        "vocab_size": 16,
    }
    assert config_from_published(published) == CaduceusConfig(
        d_model=256, n_layer=16, rcps=True, residual_in_fp32=False
    )
    of_mamba_ssm = {"mixer": "mamba2", "d_model": 32, "n_layer": 1, "ssm_cfg": {"layer": "Mamba2", "d_state": 64}}
    assert config_from_published(of_mamba_ssm).mixer == "mamba2"  # its MambaConfig names the layer
    assert config_from_published({"d_model": 8, "n_layer": 1, "ssm_cfg": None}) == CaduceusConfig(d_model=8, n_layer=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": 1}, "colour: unknown key"),
        ({"ssm_cfg": {"d_state": 8, "heads": 2}}, "ssm_cfg.heads: unknown key"),
        ({"ssm_cfg": {"d_state": 8, "bias": True}}, "ssm_cfg.bias: only False is supported, got True"),
        ({"ssm_cfg": {"d_state": 8, "conv_bias": False}}, "ssm_cfg.conv_bias: only True"),
        ({"ssm_cfg": {"d_state": 8, "dt_rank": 5}}, "ssm_cfg.dt_rank: only 'auto' or 2"),
        ({"ssm_cfg": {"d_state": "8"}}, "ssm_cfg.d_state: expected int, got '8'"),
        ({"d_model": 20.5}, "d_model: expected int, got 20.5"),
        ({"rcps": 1}, "rcps: expected bool, got 1"),
        ({"n_layer": 0}, "n_layer: must be at least 1"),
        ({"bidirectional_strategy": "concat"}, "bidirectional_strategy: choose one of add, ew_multiply"),
        ({"vocab_size": 50277}, "vocab_size: only 12 or 16 or 8"),
        ({"vocab_size_padded": 24}, "vocab_size_padded: only 16"),
        ({"model_type": "mamba"}, "model_type: only 'caduceus'"),
        ({"complement_map": {str(i): i for i in range(16)}}, "complement_map: not the complement"),
        ({"complement_map": [0, 1]}, r"complement_map: expected an object of keys and values, got \[0, 1\]"),
        ({"ssm_cfg": "mamba"}, "ssm_cfg: expected an object of keys and values, got 'mamba'"),
        ({"ssm_cfg": {"d_state": 8, "layer": "Mamba2"}}, "ssm_cfg.layer: only 'Mamba1' is supported, got 'Mamba2'"),
        (
            {"mixer": "mamba2", "ssm_cfg": {"headdim": 8, "dt_limit": 5}},
            r"ssm_cfg.dt_limit: only \(0, inf\) is supported, got 5",
        ),
    ],
)
def test_configurations_that_cannot_be_honoured_are_refused(golden_ps, change, message):
    with pytest.raises(UserError, match="^" + r"(model\.)?" + message) as refused:
        from_published({**golden_ps.config, **change}, golden_ps.part("state"))
    assert "\n" not in str(refused.value)


def test_a_missing_size_is_refused(golden_ps):
    config = {key: value for key, value in golden_ps.config.items() if key != "d_model"}
    with pytest.raises(UserError, match=r"^d_model: missing from the configuration"):
        from_published(config, golden_ps.part("state"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{MIXER}.mamba_rev.A_log", None, "missing from the state dict"),
        ("lm_head.complement_map", None, "missing from the state dict"),
        (f"{MIXER}.mamba_mid.A_log", torch.zeros(40, 8), "not part of this model"),
        (f"{MIXER}.mamba_fwd.D", torch.zeros(41), r"expected shape \[40\], got \[41\]"),
        (f"{MIXER}.mamba_fwd.conv1d.weight", torch.zeros(40, 4), r"expected shape \[40, 1, 4\], got \[40, 4\]"),
        (f"{MIXER}.mamba_fwd.D", torch.zeros(40, dtype=torch.long), "expected a tensor like torch.float32"),
        (f"{MIXER}.mamba_rev.in_proj.weight", torch.zeros(80, 20), "differs from .*mamba_fwd.in_proj.weight"),
        ("lm_head.lm_head.weight", torch.zeros(16, 20), f"differs from {EMBEDDING}"),
        ("lm_head.complement_map", torch.arange(16), "not the complement"),
    ],
)
def test_state_dicts_that_do_not_fit_are_refused_by_name(golden_ps, name, value, message):
    state = golden_ps.part("state")
    state.pop(name, None)
    if value is not None:
        state[name] = value
    with pytest.raises(UserError, match=f"^{name}: .*{message}") as refused:
        from_published(golden_ps.config, state)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_of_the_other_block_form_is_refused(golden_ps):
    with pytest.raises(UserError, match=r"norm.submodule.weight: missing from the state dict .and 3 more"):
        from_published({**golden_ps.config, "fused_add_norm": False}, golden_ps.part("state"))


def test_models_of_our_own_survive_the_round_trip():
    model = CaduceusForMaskedLM(CaduceusConfig(d_model=12, n_layer=2, bidirectional_weight_tie=False))
    again = from_published(*to_published(model))
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
