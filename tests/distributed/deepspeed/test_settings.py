"""Whose word counts where a DeepSpeed file and the run's configuration speak of the same thing."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from caduceus.config import Config, config_from_dict
from caduceus.distributed.deepspeed.settings import engine_settings
from caduceus.distributed.layout import check_layout
from caduceus.errors import UserError

DATA_WORLD, PARAMETERS, BLOCK = 2, 80_000, 10_000


def config(path: Path | None = None, **parallel: Any) -> Config:
    return config_from_dict(
        {
            "train": {"global_batch": 16, "micro_batch": 4, "clip_norm": 0.5, "precision": "bf16"},
            "parallel": {"deepspeed_config": path and str(path), **parallel},
        }
    )


def settings_of(path: Path, settings: dict, **parallel: Any) -> dict:
    path.write_text(json.dumps(settings))
    return engine_settings(config(path, **parallel), DATA_WORLD, PARAMETERS, BLOCK)


def test_without_a_file_the_configuration_decides_all() -> None:
    settings = engine_settings(config(zero_stage=3, cpu_offload=True), DATA_WORLD, PARAMETERS, BLOCK)
    assert settings["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": BLOCK,
        "stage3_param_persistence_threshold": PARAMETERS // 1000,
        "stage3_prefetch_bucket_size": BLOCK,
        "stage3_max_live_parameters": 2 * BLOCK,
        "stage3_max_reuse_distance": BLOCK,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }
    assert settings["train_micro_batch_size_per_gpu"] == 4 and settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 0
    assert settings["torch_autocast"]["enabled"]
    huge = engine_settings(config(zero_stage=3), DATA_WORLD, 10**12, 10**10)["zero_optimization"]
    assert list(huge.values()) == [3, 500_000_000, 100_000, 50_000_000, 1_000_000_000, 1_000_000_000]


def test_what_a_file_says_beyond_is_kept_and_what_it_leaves_open_is_ours(tmp_path: Path) -> None:
    theirs = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": True},
        "wall_clock_breakdown": True,
        "zero_optimization": {"stage": 2, "overlap_comm": False, "reduce_bucket_size": "auto"},
    }
    settings = settings_of(tmp_path / "ds.json", theirs, zero_stage=2)
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": False, "reduce_bucket_size": BLOCK}
    assert settings["wall_clock_breakdown"] is True
    assert not {"bf16", "train_batch_size"} & settings.keys()


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        ({"gradient_clipping": 1.0}, "train.clip_norm"),
        ({"train_batch_size": 32}, "train.global_batch"),
        ({"train_micro_batch_size_per_gpu": 8}, "train.micro_batch"),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps"),
        ({"zero_optimization": {"stage": 3}}, "parallel.zero_stage"),
        ({"fp16": {"enabled": True}}, "fp16.enabled"),
        ({"data_efficiency": {"enabled": True}}, "data_efficiency"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, '"nvme"; it takes "cpu" or "none"'),
        ({"zero_optimization": [1]}, "ds.json sets zero_optimization to [1]"),
        ({"zero_optimization": {"offload_param": "cpu"}}, "zero_optimization.offload_param"),
        ({"bf16": True}, "bf16"),
    ],
)
def test_a_file_that_contradicts_is_refused_by_its_key(tmp_path: Path, theirs: dict, named: str) -> None:
    with pytest.raises(UserError, match=r"parallel\.deepspeed_config") as refusal:
        settings_of(tmp_path / "ds.json", theirs)
    assert named in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("amp.enabled", True),
        ("autotuning.enabled", True),
        ("compression_training.weight_quantization.shared_parameters.enabled", True),
        ("curriculum_learning.enabled", True),
        ("eigenvalue.enabled", True),
        ("elasticity.enabled", True),
        ("hybrid_engine.enabled", True),
        ("nebula.enabled", True),
        ("progressive_layer_drop.enabled", True),
        ("quantize_training.enabled", True),
        ("weight_quantization.quantized_initialization.num_bits", 8),
        ("sparse_gradients", True),
        ("prescale_gradients", True),
        ("gradient_predivide_factor", 2.0),
        ("gradient_allreduce_op", "sum"),
        ("managed_gradient_accumulation", False),
        ("communication_data_type", "bf16"),
        ("communication_data_type", "fp8"),
        ("data_types.grad_accum_dtype", "bf16"),
        ("data_types.param_dtype", "fp16"),
        ("torch_autocast.dtype", "float16"),
        ("torch_autocast.lower_precision_safe_modules", ["torch.nn.Linear"]),
        ("bf16.bf16_master_weights_and_grads", True),
        ("sequence_parallel_size", 2),
        ("data_parallel_size", 4),
        ("disable_allgather", True),
        ("seq_parallel_communication_data_type", "fp32"),
        ("data_types.grad_accum_dtype", "fp32"),
        ("compile.deepcompile", True),
        ("a_key_of_a_later_deepspeed", "on"),
        ("zero_optimization.cpu_offload", True),
        ("zero_optimization.legacy_stage1", True),
        ("zero_force_ds_cpu_optimizer", True),
        ("datastates_ckpt", {"host_cache_size": 16}),
        ("checkpoint.writer", {"type": "FAST"}),
        ("checkpoint.load_universal", True),
        ("checkpoint.use_node_local_storage", True),
        ("zero_optimization.compute_grad_norm", False),
        ("zero_optimization.contiguous_gradients", False),
        ("zero_optimization.elastic_checkpoint", True),
        ("zero_optimization.mics_shard_size", 2),
        ("zero_optimization.offload_optimizer.ratio", 0.5),
        ("zero_optimization.offload_optimizer.super_offload", True),
        ("zero_optimization.round_robin_gradients", True),
        ("zero_optimization.zenflow", {"topk_ratio": 0.1}),
        ("zero_optimization.zero_hpz_partition_size", 2),
        ("zero_optimization.zero_quantized_gradients", True),
        ("zero_optimization.zero_quantized_weights", True),
        ("zero_optimization.zeropp_loco_param", {"err_beta": 0.8}),
    ],
)
@pytest.mark.parametrize("stage", [1, 3])
def test_what_would_change_the_run_is_refused_by_its_name(tmp_path: Path, key: str, value: Any, stage: int) -> None:
    theirs = value
    for part in reversed(key.split(".")):
        theirs = {part: theirs}
    with pytest.raises(UserError, match=r"^parallel\.deepspeed_config: \S+ds\.json sets ([\w.]+)\b") as refusal:
        settings_of(tmp_path / "ds.json", theirs, zero_stage=stage)
    named = str(refusal.value).split(" sets ")[1].split()[0].strip(",")
    assert f"{key}.".startswith(f"{named}.") and named != "zero_optimization"
    assert "leave" in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "theirs",
    [
        {
            "amp": {"enabled": False, "opt_level": "O1"},
            "compression_training": {
                "weight_quantization": {
                    "shared_parameters": {"enabled": False, "quantize_groups": 1},
                }
            },
            "curriculum_learning": {"enabled": False},
            "data_efficiency": {"enabled": False, "data_routing": {"random_ltd": {"enabled": True}}},
            "eigenvalue": {"enabled": False, "max_iter": 100},
            "hybrid_engine": {"enabled": False, "max_out_tokens": 512},
            "nebula": {"enabled": False},
            "progressive_layer_drop": {"enabled": False, "theta": 0.5},
            "sparse_gradients": False,
            "tensor_parallel": {"autotp_size": 0},
        },
        {
            "prescale_gradients": False,
            "gradient_predivide_factor": 1.0,
            "communication_data_type": "FP32",
            "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
            "zero_optimization": {"contiguous_gradients": True, "stage": 2},
        },
        {"optimizer": None, "scheduler": None, "bf16": None, "fp16": {"enabled": False, "loss_scale": 0}},
        {
            "zero_optimization": {
                "offload_optimizer": None,
                "offload_param": None,
                "zenflow": None,
                "zero_quantized_weights": False,
            }
        },
        {"_comment": "tuned for 8 GPUs", "comment": 1, "//": ["x"], "zero_optimization": {"_why": "fast"}},
        {"zero_optimization": None},
        {
            "fp16": {"enabled": "auto", "loss_scale": 0, "initial_scale_power": 16},
            "bf16": {"enabled": "auto"},
            "zero_optimization": {
                "stage": "auto",
                "reduce_bucket_size": "auto",
                "stage3_param_persistence_threshold": "auto",
                "offload_optimizer": "auto",
            },
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "train_batch_size": "auto",
            "train_micro_batch_size_per_gpu": "auto",
        },
    ],
    ids=["off", "held anyway", "null", "null in ZeRO", "remarks", "no ZeRO", "auto"],
)
def test_what_says_no_more_than_the_run_is_as_no_file(tmp_path: Path, theirs: dict) -> None:
    settings = settings_of(tmp_path / "ds.json", theirs, zero_stage=2)
    without = engine_settings(config(zero_stage=2), DATA_WORLD, PARAMETERS, BLOCK)
    assert settings == without


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_in_fp32_it_does_not_matter_how_autocast_would_be(tmp_path: Path, precision: str) -> None:
    (tmp_path / "ds.json").write_text('{"torch_autocast": {"enabled": false, "dtype": "float16"}}')
    configured = config(tmp_path / "ds.json")
    configured.train.precision = precision
    if precision == "fp32":
        assert not engine_settings(configured, DATA_WORLD, PARAMETERS, BLOCK)["torch_autocast"]["enabled"]
        return
    with pytest.raises(UserError, match=r"torch_autocast\.enabled to false"):
        engine_settings(configured, DATA_WORLD, PARAMETERS, BLOCK)


def test_offloading_of_the_run_completes_that_of_a_file(tmp_path: Path) -> None:
    theirs = {"zero_optimization": {"offload_optimizer": {"pin_memory": False}}}
    zero = settings_of(tmp_path / "ds.json", theirs, zero_stage=3, cpu_offload=True)["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert zero["offload_param"] == {"device": "cpu"}
    theirs["zero_optimization"]["offload_optimizer"]["device"] = "none"
    with pytest.raises(UserError, match=r"parallel\.cpu_offload"):
        settings_of(tmp_path / "ds.json", theirs, zero_stage=2, cpu_offload=True)


def test_a_byte_order_mark_is_passed_over_and_a_key_that_stands_twice_refused(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"steps_per_print": 7}', encoding="utf-8-sig")
    assert engine_settings(config(tmp_path / "ds.json"), DATA_WORLD, PARAMETERS, BLOCK)["steps_per_print"] == 7
    (tmp_path / "ds.json").write_text('{"steps_per_print": 7, "bf16": {}, "steps_per_print": 8}')
    with pytest.raises(UserError, match=r"ds\.json .*steps_per_print stands twice"):
        engine_settings(config(tmp_path / "ds.json"), DATA_WORLD, PARAMETERS, BLOCK)


def test_a_file_is_checked_with_the_layout_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"zero_optimization": [1]}')
    check_layout(config(tmp_path / "ds.json", strategy="ddp"), DATA_WORLD)
    with pytest.raises(UserError, match=r"ds\.json sets zero_optimization"):
        check_layout(config(tmp_path / "ds.json", strategy="deepspeed"), DATA_WORLD)


def test_optimizer_and_schedule_of_a_file_give_way_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = {"optimizer": {"type": "Adam", "params": {"lr": 1}}, "scheduler": {"type": "WarmupLR"}}
    with caplog.at_level(logging.WARNING):
        settings = settings_of(tmp_path / "ds.json", theirs)
    assert not theirs.keys() & settings.keys()
    assert len(caplog.messages) == 1 and "optimizer" in caplog.messages[0] and "scheduler" in caplog.messages[0]


def test_files_that_are_none_and_double_precision_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.json"):
        engine_settings(config(tmp_path / "missing.json"), DATA_WORLD, PARAMETERS, BLOCK)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="not a JSON object"):
        engine_settings(config(tmp_path / "list.json"), DATA_WORLD, PARAMETERS, BLOCK)
    double = config()
    double.train.precision = "fp64"
    with pytest.raises(UserError, match=r"train\.precision"):
        engine_settings(double, DATA_WORLD, PARAMETERS, BLOCK)


@pytest.mark.parametrize(
    ("theirs", "named"),
    [
        (
            {"zero_optimization": {"overlap_com": True}},
            r"zero_optimization.overlap_com,.*zero_optimization.overlap_comm",
        ),
        (
            {"zero_optimization": {"overlap_comm": "maybe"}},
            'zero_optimization.overlap_comm to "maybe"; .*true or false',
        ),
        ({"zero_optimization": {"overlap_comm": 1}}, "zero_optimization.overlap_comm to 1; .*true or false"),
        ({"zero_optimization": {"reduce_bucket_size": "5 MB"}}, "zero_optimization.reduce_bucket_size .* a number"),
        ({"zero_optimization": {"reduce_bucket_size": -1}}, "zero_optimization.reduce_bucket_size to -1; .* a number"),
        ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, 'offload_optimizer.device .*"cpu" or "none"'),
        ({"zero_optimization": {"offload_param": {"pin_mem": 1}}}, "offload_param.pin_mem,.*offload_param.pin_memory"),
        ({"bf16": {"enable": True}}, r"bf16\.enable,"),
        ({"bf16": {"enabled": True, "loss_scale": 8}}, r"bf16\.loss_scale,"),
        ({"fp16": {"loss_scale": "big"}}, r"fp16\.loss_scale,"),
        ({"activation_checkpointing": True}, "activation_checkpointing to true; it takes an object"),
        ({"comms_logger": [1]}, r"comms_logger to \[1\]; it takes an object"),
        ({"steps_per_print": True}, "steps_per_print to true; it takes a number"),
        ({"zero_optimisation": {"overlap_comm": True}}, "zero_optimisation, .*zero_optimization meant"),
    ],
)
def test_mistakes_are_named_with_what_is_taken(tmp_path: Path, theirs: dict, named: str) -> None:
    with pytest.raises(UserError, match=rf"^parallel\.deepspeed_config: .*ds\.json sets .*{named}") as refusal:
        settings_of(tmp_path / "ds.json", theirs)
    assert "\n" not in str(refusal.value)


def test_what_changes_no_number_is_taken(tmp_path: Path) -> None:
    theirs = {
        "steps_per_print": 100,
        "wall_clock_breakdown": True,
        "zero_allow_untested_optimizer": True,
        "activation_checkpointing": {"partition_activations": True, "number_checkpoints": 4},
        "flops_profiler": {"enabled": True, "profile_step": 3},
        "comms_logger": {"enabled": False, "prof_ops": ["all_reduce"]},
        "bf16": {"enabled": True, "check_grad_overflow": False},
        "zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": "auto"}, "sub_group_size": 1e9},
        "tensorboard": {"enabled": False, "output_path": "logs"},
    }
    settings = settings_of(tmp_path / "ds.json", theirs, zero_stage=2)
    for key in theirs.keys() - {"bf16", "zero_optimization"}:
        assert settings[key] == theirs[key]
    assert settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert settings["zero_optimization"]["sub_group_size"] == 1e9
