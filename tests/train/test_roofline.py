"""Counts of operations against counts made otherwise."""

from collections.abc import Iterator

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from caduceus import CaduceusConfig, CaduceusForMaskedLM
from caduceus.config import Config
from caduceus.model.costs import exponentials_per_base, flops_per_base
from caduceus.train import roofline
from caduceus.train.roofline import utilization


@pytest.fixture(autouse=True)
def nothing_known_of_the_device() -> Iterator[None]:
    """Peaks are looked up once in a process."""
    roofline._peaks.cache_clear()
    yield
    roofline._peaks.cache_clear()


@pytest.mark.moderate
@pytest.mark.parametrize("rcps", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_matrix_products_are_those_that_torch_counts(rcps: bool, tied: bool, bidirectional: bool) -> None:
    shape = {"d_model": 32, "n_layer": 2, "d_state": 4, "rcps": rcps}
    config = CaduceusConfig(**shape, bidirectional=bidirectional, bidirectional_weight_tie=tied)
    model = CaduceusForMaskedLM(config, backend="naive")
    bases = 64
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.randint(7, 11, (1, bases))).logits  # noqa: B018
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if "conv" not in str(operation))
    # The definition reads the states out by a product as well, which the scans' own kernels do as they go.
    streams, directions = 1 + rcps, 1 + bidirectional
    readout = 2 * config.d_inner * config.d_state * config.n_layer * streams * directions * bases
    assert flops_per_base(config) * bases == 3 * (products - readout)


def test_the_published_model_of_131k_has_its_known_costs() -> None:
    config = CaduceusConfig(d_model=256, n_layer=16)
    assert flops_per_base(config) == pytest.approx(44.0e6, rel=0.01)
    assert exponentials_per_base(config) == 4 * 16 * 2 * 512 * 16  # passes, layers, directions, channels, states


def test_shares_of_the_peaks_of_a_known_gpu(monkeypatch) -> None:
    config = Config()
    assert utilization(config, 1e6, torch.device("cpu")) == {}
    h100 = roofline.PEAKS["H100"]
    monkeypatch.setattr(roofline, "_peaks", lambda device: h100)
    config.train.precision = "bf16"
    rate = h100.exponentials / exponentials_per_base(config.model)
    shares = utilization(config, rate, torch.device("cuda"))
    assert shares["scan_roofline"] == pytest.approx(1)
    assert shares["mfu"] == pytest.approx(flops_per_base(config.model) * rate / 989e12)


def test_a_card_of_unknown_peaks_is_told_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA Unheard Of")
    for _ in range(2):
        assert utilization(Config(), 1e6, torch.device("cuda")) == {}
    assert [record.getMessage() for record in caplog.records] == [
        "perf: the peak rates of 'NVIDIA Unheard Of' are unknown, so rows have no mfu and no scan_roofline"
    ]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L40", None),  # of other rates than an L4 or an L40S
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
    ],
)
def test_a_card_has_its_own_peaks_or_none(name: str, known: str | None, monkeypatch, caplog) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    config, gpu = Config(), torch.device("cuda", len(name))  # what was found is kept by device
    roofline._peaks.cache_clear()
    shares = utilization(config, 1e6, gpu)
    if known is None:
        assert shares == {} and name in caplog.text
    else:
        expected = exponentials_per_base(config.model) * 1e6 / roofline.PEAKS[known].exponentials
        assert shares["scan_roofline"] == pytest.approx(expected) and not caplog.text
    roofline._peaks.cache_clear()


def test_exponentials_are_at_the_clock_of_the_fp32_rate() -> None:
    """With a lower one, shares could exceed 1. A multiprocessor does 64 (A100) or 128 fp32 products per clock."""
    for name, peaks in roofline.PEAKS.items():
        lanes = 64 if name == "A100" else 128
        assert peaks.fp32_flops / peaks.exponentials == pytest.approx(2 * lanes / 16, rel=0.01), name
