import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caduceus.config import TrainConfig
from caduceus.errors import UserError
from caduceus.train.schedule import (
    default_decay_start,
    default_warmup,
    kept_decay_start,
    kept_warmup,
    learning_rate,
)


def test_schedule_is_the_published_one() -> None:
    config = TrainConfig(steps=1000, lr=8e-3, min_lr=1e-4)
    assert default_warmup(config) == 100
    assert learning_rate(1, config, 100) == 1e-6
    assert learning_rate(51, config, 100) == pytest.approx(1e-6 + (8e-3 - 1e-6) * 0.5, rel=1e-12)
    assert learning_rate(101, config, 100) == 8e-3
    assert learning_rate(551, config, 100) == pytest.approx((8e-3 + 1e-4) / 2, rel=1e-12)
    end = 1e-4 + (8e-3 - 1e-4) * (1 + math.cos(math.pi * 899 / 900)) / 2
    assert learning_rate(1000, config, 100) == pytest.approx(end, rel=1e-12)


@given(steps=st.integers(1, 500), warmup=st.none() | st.integers(0, 500))
def test_the_rate_rises_then_falls_within_its_bounds(steps: int, warmup: int | None) -> None:
    warmup = warmup if warmup is None else min(warmup, steps)
    config = TrainConfig(steps=steps, warmup_steps=warmup)
    rates = [learning_rate(step, config, default_warmup(config)) for step in range(1, steps + 1)]
    peak = steps // 10 if warmup is None else warmup
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert all(1e-6 <= rate <= config.lr for rate in rates)


@given(step=st.integers(1, 400), steps=st.integers(401, 5000), warmup=st.none() | st.integers(0, 400))
def test_with_more_steps_the_rate_never_goes_back_into_warm_up(step: int, steps: int, warmup: int | None) -> None:
    former = TrainConfig(steps=400, warmup_steps=warmup)
    longer = TrainConfig(steps=steps, warmup_steps=warmup)
    began_with = default_warmup(former)
    kept = kept_warmup(longer, former, began_with, step)
    assert kept == began_with
    if step >= kept:
        rates = [learning_rate(number, longer, kept) for number in range(step + 1, steps + 1)]
        assert rates == sorted(rates, reverse=True) and rates[0] >= learning_rate(step + 1, former, kept)


def test_a_longer_warm_up_is_taken_within_the_first_and_refused_after_it() -> None:
    former, longer = TrainConfig(steps=1000, warmup_steps=100), TrainConfig(steps=1000, warmup_steps=300)
    assert kept_warmup(longer, former, 100, step=99) == 300
    assert kept_warmup(longer, former, 100, step=300) == 300
    for step in (100, 299):
        with pytest.raises(UserError, match=rf"warmup_steps: 300 .* back into warm-up, .* step 100 of the {step}"):
            kept_warmup(longer, former, 100, step)


def test_a_warm_up_left_to_the_run_is_the_one_that_it_began_with() -> None:
    former = TrainConfig(steps=1000, warmup_steps=100)
    assert kept_warmup(TrainConfig(steps=9000), former, 100, step=50) == 100


def wsd(steps: int, **keys: int | str) -> TrainConfig:
    return TrainConfig(steps=steps, schedule="wsd", **keys)


def test_wsd_stays_and_falls_in_its_last_steps() -> None:
    config = wsd(1000, decay_steps=200)
    start = default_decay_start(config)
    rates = [learning_rate(step, config, 100, start) for step in range(1, 1001)]
    assert start == 800 and set(rates[100:801]) == {config.lr}
    assert rates[850] == pytest.approx(config.min_lr + (config.lr - config.min_lr) * 0.5)
    assert rates[800:] == sorted(rates[800:], reverse=True) and config.min_lr < rates[-1] < 1.3 * config.min_lr
    assert default_decay_start(wsd(1000)) == 900
    assert default_decay_start(wsd(1000), branched_at=640) == 640
    assert default_decay_start(config, branched_at=640) == 800
    assert default_decay_start(TrainConfig()) is None


def test_other_schedules_do_not_ask_where_the_run_ends() -> None:
    for schedule in ("constant", "inverse_sqrt"):
        short, long = (TrainConfig(steps=steps, schedule=schedule) for steps in (1000, 9000))
        rates = [learning_rate(step, short, 100) for step in range(1, 1001)]
        assert rates == [learning_rate(step, long, 100) for step in range(1, 1001)]
        assert rates[0] == 1e-6 and rates[100] == 8e-3 == max(rates)
        assert rates[400] == (8e-3 if schedule == "constant" else pytest.approx(8e-3 / 2))
    assert learning_rate(10**9, TrainConfig(schedule="inverse_sqrt"), 100) == 1e-4
    assert learning_rate(1, TrainConfig(schedule="inverse_sqrt"), 0) == 8e-3


@pytest.mark.moderate
@given(step=st.integers(0, 900), steps=st.integers(950, 5000))
def test_before_its_decay_a_run_under_wsd_takes_any_length(step: int, steps: int) -> None:
    former, now = wsd(1000), wsd(steps)
    start = kept_decay_start(now, former, 900, step)
    assert step <= start < steps
    assert all(learning_rate(number, now, 0, start) == now.lr for number in range(step + 1, start + 2))


def test_within_its_decay_it_keeps_its_end() -> None:
    former = wsd(1000, decay_steps=100)
    assert kept_decay_start(former, former, 900, 950) == 900
    with pytest.raises(UserError, match=r"falls from step 900 .*train\.decay_from=RUN/checkpoints/step-00000900$"):
        kept_decay_start(wsd(2000, decay_steps=100), former, 900, 901)
    assert kept_decay_start(former, TrainConfig(steps=1000), None, 950) == 950
    assert kept_decay_start(TrainConfig(), former, 900, 901) is None
