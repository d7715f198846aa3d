import pytest

from caduceus import CaduceusForMaskedLM
from caduceus.config import CaduceusConfig, config_from_dict
from launch.plan import parameter_count, plan


@pytest.mark.parametrize(
    "keys",
    [
        {"d_model": 32, "n_layer": 2},
        {"d_model": 24, "n_layer": 3, "rcps": True},
        {"d_model": 32, "n_layer": 1, "bidirectional_weight_tie": False},
        {"d_model": 16, "n_layer": 2, "bidirectional": False},
        {"d_model": 16, "n_layer": 2, "rms_norm": False, "d_state": 8, "expand": 3},
    ],
)
def test_parameters_are_counted_as_the_model_has_them(keys):
    config = CaduceusConfig(**keys)
    model = CaduceusForMaskedLM(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


def published(seq_len: int, **train):
    return config_from_dict(
        {
            "model": {"d_model": 256, "n_layer": 16},
            "data": {"seq_len": seq_len},
            "train": {"global_batch": 2**20 // seq_len * 8, "micro_batch": 1, **train},
        }
    )


def test_memory_at_the_published_sizes():
    # Estimates of 9.4 GB at 131 kb and 75 GB at 1 Mb for the 7.7M model without checkpointing.
    assert plan(published(2**17), 8).memory_bytes == pytest.approx(9.4e9, rel=0.1)
    assert plan(published(2**20), 8).memory_bytes == pytest.approx(75e9, rel=0.1)
    assert plan(published(2**20, activation_checkpointing="block"), 8).memory_bytes < 25e9


def test_time_follows_the_work_of_a_rank():
    one = plan(published(2**17), 8)
    assert one.sequences == 8 and one.step_seconds == pytest.approx(8 * 2**17 * 0.65e-6)
    assert plan(published(2**17), 16).step_seconds == pytest.approx(one.step_seconds / 2)
