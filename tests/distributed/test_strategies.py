"""Every layout trains the same run: losses and gradients against one process, on real shards."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.layouts import LAYOUTS, Layout, Observed, config_of, train_all

pytestmark = pytest.mark.slow

STEPS = 10
"""The first step warms up, and the rate falls over the others: every part of a step has worked by then."""
IN_FP64 = {(1, "fp32"): 3, (2, "fp32"): 3, (1, "fp64"): STEPS, (2, "fp64"): STEPS}
"""Steps trained, by accumulation and precision, where fp64 shows that all steps agree far below what fp32 rounds."""
IN_FP32 = {(1, "fp32"): STEPS, (2, "fp32"): STEPS}
LEARNING = {(1, "fp64"): 30, (2, "fp64"): 30}
"""Steps of the trainings in one process, by micro-batches and precision."""
Run = tuple[list[float], list[float], Observed]
"""Losses and gradient norms of all steps, and what the main rank observed."""


def steps_of(layout: Layout) -> dict[tuple[int, str], int]:
    return IN_FP64 if layout.computes_fp64 else IN_FP32


@pytest.fixture(scope="module")
def runs(small_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, str, int], Run]:
    """All layouts by (name, accumulation, precision, steps), all trainings on as many ranks in one set of processes."""
    directory = tmp_path_factory.mktemp("layouts")
    runs = {}
    for world in (1, 2, 4):
        layouts = [layout for layout in LAYOUTS if layout.world == world]
        planned = [(layout, *key, steps) for layout in layouts for key, steps in steps_of(layout).items()]
        if world == 1:
            planned += [(layouts[0], *key, steps) for key, steps in (IN_FP32 | LEARNING).items()]
        configs = [
            config_of(
                layout,
                small_shards,
                directory / f"{world}-{number}",
                accumulation,
                precision=precision,
                steps=steps,
            )
            for number, (layout, accumulation, precision, steps) in enumerate(planned)
        ]
        for (layout, *key), config, observed in zip(planned, configs, train_all(world, configs), strict=True):
            rows = [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]
            losses, norms = ([row[name] for row in rows] for name in ("loss", "grad_norm"))
            runs[(layout.name, *key)] = losses, norms, observed[0]
    return runs


@pytest.fixture(params=[layout for layout in LAYOUTS if layout.world > 1], ids=lambda layout: layout.name)
def layout(request: pytest.FixtureRequest) -> Layout:
    return request.param


@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_of_all_steps_are_those_of_one_process(runs: dict, layout: Layout, accumulation: int) -> None:
    steps = steps_of(layout)[accumulation, "fp32"]
    losses, norms, _ = runs[layout.name, accumulation, "fp32", steps]
    expected_losses, expected_norms, _ = runs["single", accumulation, "fp32", steps]
    assert len(losses) == steps
    # fp32 sums in another order; AdamW amplifies their rounding from step to step.
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert losses[0] == pytest.approx(expected_losses[0], rel=1e-6)
    assert norms[0] == pytest.approx(expected_norms[0], rel=1e-6)
    assert norms == pytest.approx(expected_norms, rel=1e-3)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_gradient_of_the_first_step_is_that_of_one_process(runs: dict, layout: Layout, accumulation: int) -> None:
    gradients = runs[layout.name, accumulation, "fp32", steps_of(layout)[accumulation, "fp32"]][2].gradients
    expected = runs["single", 1, "fp32", 3][2].gradients
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        # Relative to the largest entry of the parameter: small entries are sums that nearly cancel. Some hundred terms
        # in another order, each rounded by 6e-8, differ by 1e-6; which processor adds them up may double that.
        scale = gradient.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=min(1e-6, 3e-6 * scale), msg=name)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_in_double_all_steps_agree_to_rounding(runs: dict, layout: Layout, accumulation: int) -> None:
    if not layout.computes_fp64:
        pytest.skip("DeepSpeed has no fp64")
    losses, norms, observed = runs[layout.name, accumulation, "fp64", STEPS]
    expected_losses, expected_norms, expected = runs["single", accumulation, "fp64", STEPS]
    assert len(losses) == STEPS
    assert losses == pytest.approx(expected_losses, rel=1e-9)
    assert norms == pytest.approx(expected_norms, rel=1e-7)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(observed.gradients[name], gradient, rtol=1e-9, atol=1e-12)


def test_one_process_learns_and_does_not_depend_on_accumulation(runs: dict) -> None:
    losses = [runs["single", accumulation, "fp64", 30][0] for accumulation in (1, 2)]
    assert losses[0][-1] < losses[0][0] - 0.5
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    whole, parts = (runs["single", 1, "fp32", 3][2], runs["single", 2, "fp64", 30][2])
    for name, gradient in parts.gradients.items():
        torch.testing.assert_close(whole.gradients[name].double(), gradient, rtol=0, atol=1e-6)
