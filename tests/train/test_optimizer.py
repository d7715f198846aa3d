import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caduceus.config import TrainConfig
from caduceus.train.optimizer import learning_rate


def test_schedule_is_the_published_one() -> None:
    config = TrainConfig(steps=1000, lr=8e-3, min_lr=1e-4)
    assert learning_rate(1, config) == 1e-6
    assert learning_rate(51, config) == pytest.approx(1e-6 + (8e-3 - 1e-6) * 0.5, rel=1e-12)
    assert learning_rate(101, config) == 8e-3
    assert learning_rate(551, config) == pytest.approx((8e-3 + 1e-4) / 2, rel=1e-12)
    end = 1e-4 + (8e-3 - 1e-4) * (1 + math.cos(math.pi * 899 / 900)) / 2
    assert learning_rate(1000, config) == pytest.approx(end, rel=1e-12)


@given(steps=st.integers(1, 500), warmup=st.none() | st.integers(0, 500))
def test_the_rate_rises_then_falls_within_its_bounds(steps: int, warmup: int | None) -> None:
    warmup = warmup if warmup is None else min(warmup, steps)
    config = TrainConfig(steps=steps, warmup_steps=warmup)
    rates = [learning_rate(step, config) for step in range(1, steps + 1)]
    peak = steps // 10 if warmup is None else warmup
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert all(1e-6 <= rate <= config.lr for rate in rates)
