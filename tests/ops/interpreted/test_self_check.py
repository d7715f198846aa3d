"""What a process does before it trusts the Triton kernels on a machine."""

import logging

import pytest
import torch

from caduceus.config import CaduceusConfig
from caduceus.errors import UserError
from caduceus.ops import backends, self_check
from caduceus.ops.triton import scan_launches


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(self_check, "SIZES", (9, 5, 3))  # as the interpreter can do them
    monkeypatch.setattr(self_check, "WHOLE", (16, 4))
    return tmp_path / "caduceus"


def remembered(cache):
    return list(cache.glob("*.json"))


@pytest.mark.slow
def test_right_kernels_are_looked_at_once_and_leave_the_random_numbers(device, cache, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    before = torch.get_rng_state()
    self_check.check_kernels(device)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(remembered(cache)) == 1
    assert caplog.text.index("are compared with their definitions") < caplog.text.index("11 Triton ops are right")
    looked = []
    monkeypatch.setattr(self_check, "_require_right", lambda *case: looked.append(case))
    self_check.check_kernels(device)
    assert not looked
    monkeypatch.setattr(self_check, "_machine", lambda device: {"card": "another"})
    self_check.check_kernels(device)
    assert len(looked) == 22  # each op in fp32 and in bf16


@pytest.fixture
def off_by_a_thousandth(monkeypatch):
    """The gradient of dt."""
    right = scan_launches.ScanKernels.gradients

    def wrong(self, *arguments):
        gradients = right(self, *arguments)
        return gradients[0], gradients[1] * 1.001, *gradients[2:]

    monkeypatch.setattr(scan_launches.ScanKernels, "gradients", wrong)


@pytest.mark.usefixtures("off_by_a_thousandth")
def test_a_wrong_gradient_is_named_and_nothing_is_remembered(device, cache):
    line = r"^ops\.backend: the Triton kernels are wrong on .*: scan \(9 tokens, 5 channels, 3 states\) in float32, "
    with pytest.raises(UserError, match=line + r"gradient of dt is off by 1\.\de-03 .* choose ops\.backend=naive"):
        self_check.check_kernels(device)
    assert not remembered(cache)


@pytest.mark.usefixtures("off_by_a_thousandth")
def test_auto_on_a_card_with_wrong_kernels_ends_in_one_line_and_only_who_asks_gets_the_definition(device, monkeypatch):
    looked, check = [], self_check.check_kernels

    def check_here(card):
        looked.append(card)
        check(device)

    monkeypatch.setattr(self_check, "check_kernels", check_here)
    monkeypatch.setattr(backends, "_cannot_launch", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("auto", "triton"):
        with pytest.raises(UserError, match=r"gradient of dt is off by .* choose ops\.backend=naive") as told:
            backends.check_backend(name, "cuda", torch.float32, CaduceusConfig())
        assert "\n" not in str(told.value)
    backends.check_backend("naive", "cuda", torch.float32, CaduceusConfig())
    assert looked == [torch.device("cuda")] * 2


def test_what_is_not_a_number_is_wrong(device, monkeypatch):
    outputs = scan_launches.ScanKernels.outputs
    monkeypatch.setattr(scan_launches.ScanKernels, "outputs", lambda *args: outputs(*args) * torch.nan)
    with pytest.raises(UserError, match="output 0 is off by inf"):
        self_check.check_kernels(device)


def test_a_card_that_sums_wrong_within_a_warp_takes_tiles_from_then_on(device, cache, caplog, monkeypatch):
    def check(case, dtype, machine):
        if scan_launches.warp_sums and dtype == torch.bfloat16 and case.name.startswith("scan"):
            raise UserError("ops.backend: the Triton kernels are wrong")

    monkeypatch.setattr(self_check, "_require_right", check)
    for _ in range(2):
        monkeypatch.setattr(scan_launches, "warp_sums", True)
        self_check.check_kernels(device)
        assert not scan_launches.warp_sums
    said = [r.getMessage() for r in caplog.records if "sums within a warp are wrong" in r.getMessage()]
    assert len(said) == 2 and len(remembered(cache)) == 1


def test_what_tiles_do_not_mend_is_an_error(device, cache, monkeypatch):
    def check(case, dtype, machine):
        if dtype == torch.bfloat16:
            raise UserError("ops.backend: the Triton kernels are wrong")

    monkeypatch.setattr(self_check, "_require_right", check)
    with pytest.raises(UserError, match="are wrong"):
        self_check.check_kernels(device)
    assert scan_launches.warp_sums and not remembered(cache)


@pytest.mark.parametrize(
    ("are_right", "states", "form"),
    [(True, 16, "sums within a warp"), (False, 16, "tiles"), (True, 18, "tiles")],
)
def test_which_sums_the_scan_takes_is_said_once(are_right, states, form, caplog, monkeypatch):
    def choose(device):
        scan_launches.warp_sums = are_right

    caplog.set_level(logging.INFO)
    backends._tell_sums.cache_clear()
    monkeypatch.setattr(scan_launches, "warp_sums", True)
    monkeypatch.setattr(self_check, "check_kernels", choose)
    monkeypatch.setattr(backends, "_cannot_launch", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for config in (CaduceusConfig(d_state=states), CaduceusConfig(d_state=states), CaduceusConfig(mixer="mamba2")):
        backends.check_backend("triton", "cuda", torch.float32, config)
    said = [r.getMessage() for r in caplog.records if "gradients of B and C" in r.getMessage()]
    assert said == [f"ops: in bf16 the scan of {states} states takes {form} for the gradients of B and C"]
