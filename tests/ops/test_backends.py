import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from caduceus.config import CaduceusConfig
from caduceus.errors import UserError
from caduceus.ops import backends, mamba_ssm, naive
from caduceus.ops.operands import ScanOperands


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends._auto_backend.cache_clear()
    yield
    backends._auto_backend.cache_clear()


def without(monkeypatch, package: str) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name == package else ModuleSpec(name, None))


@pytest.mark.parametrize(("device", "backend"), [("cpu", "cpu"), ("cuda", "triton"), ("meta", "naive")])
def test_auto_picks_the_fast_one_and_says_so(device, backend, caplog, monkeypatch):
    without(monkeypatch, "nothing")
    with caplog.at_level(logging.INFO, logger="caduceus.ops"):
        assert backends.resolve_backend("auto", device) == backend
        assert backends.resolve_backend("auto", device, torch.bfloat16) == backend
    assert [record.getMessage() for record in caplog.records] == [
        f"ops.backend: auto chose '{backend}' on device '{device}'"
    ]


def test_auto_warns_where_it_falls_back(caplog, monkeypatch):
    without(monkeypatch, "triton")
    assert backends.resolve_backend("auto", "cuda") == "naive"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "pip install" in record.getMessage()


@pytest.mark.parametrize(
    ("backend", "device", "says"),
    [
        ("abacus", "cpu", "choose one of auto, naive, cpu, triton, mamba_ssm"),
        ("triton", "cpu", "needs an NVIDIA GPU"),
        ("cpu", "cuda", "runs on the CPU only"),
        ("mamba_ssm", "cpu", "needs an NVIDIA GPU, not 'cpu'"),
    ],
)
def test_a_forced_backend_that_cannot_run_is_one_clear_line(backend, device, says, monkeypatch):
    without(monkeypatch, "nothing")
    with pytest.raises(UserError, match=r"^ops\.backend: ") as error:
        backends.resolve_backend(backend, device)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_forced_triton_names_its_install_command(monkeypatch):
    without(monkeypatch, "triton")
    with pytest.raises(UserError, match=r"pip install triton$"):
        backends.resolve_backend("triton", "cuda")


def test_triton_without_a_compiler_for_its_launcher_is_refused_before_training(monkeypatch, tmp_path):
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    from triton.runtime import driver as drivers

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(drivers, "_active", None)
    monkeypatch.setattr(drivers, "_default", None)
    monkeypatch.setattr(driver, "library_dirs", list)  # this machine need not have libcuda
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UserError, match=r"^ops\.backend: 'triton' needs a C compiler .*Failed to find C compiler.*gcc"):
        backends.resolve_backend("triton", "cuda")


def test_float64_on_a_gpu_falls_back_to_the_definition_or_is_refused(caplog, monkeypatch):
    without(monkeypatch, "nothing")
    assert backends.resolve_backend("auto", "cpu", torch.float64) == "cpu"
    assert backends.resolve_backend("auto", "cuda", torch.float64) == "naive"
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "'triton' does not compute in float64" in record.getMessage()
    assert backends.resolve_backend("auto", "cuda", torch.bfloat16) == "triton"
    with pytest.raises(UserError, match=r"^ops\.backend: 'triton' does not compute in float64: choose naive"):
        backends.resolve_backend("triton", "cuda", torch.float64)


def sized(d_state: int, d_conv: int, **keys: str) -> CaduceusConfig:
    return CaduceusConfig(d_state=d_state, d_conv=d_conv, **keys)


def test_a_model_that_a_backend_cannot_run_is_one_clear_line(monkeypatch):
    pytest.importorskip("triton")
    for sizes in ((64, 16), (1, 1)):
        backends.check_backend("auto", "cuda", torch.float32, sized(*sizes))
    with pytest.raises(UserError, match=r"^model\.d_state: ops\.backend 'triton' takes 1 to 64, got 65"):
        backends.check_backend("auto", "cuda", torch.float32, sized(65, 4))
    with pytest.raises(UserError, match=r"^model\.d_conv: ops\.backend 'triton' takes 1 to 16, got 17"):
        backends.check_backend("triton", "cuda", torch.float32, sized(16, 17))
    backends.check_backend("naive", "cuda", torch.float64, sized(65, 17))
    backends.check_backend("cpu", "cpu", torch.float64, sized(65, 17))
    backends.check_backend("triton", "cuda", torch.float32, sized(128, 4, mixer="mamba2"))
    monkeypatch.setattr(mamba_ssm, "missing", lambda: None)
    with pytest.raises(UserError, match=r"^model\.d_conv: ops\.backend 'mamba_ssm' takes 2 to 4, got 5"):
        backends.check_backend("mamba_ssm", "cuda", torch.float32, sized(16, 5))


def test_mamba_ssm_without_its_extension_is_absent(monkeypatch):
    """The default build installs the package and leaves the Mamba-1 extension out."""
    for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface", "causal_conv1d"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", None)
    assert "selective_scan_cuda" in mamba_ssm.missing()
    with pytest.raises(UserError, match=r"pip install --no-build-isolation --no-deps 'mamba-ssm"):
        backends.resolve_backend("mamba_ssm", "cuda")
    monkeypatch.setitem(sys.modules, "selective_scan_cuda", ModuleType("selective_scan_cuda"))
    assert mamba_ssm.missing() is None
    assert backends.resolve_backend("mamba_ssm", "cuda") == "mamba_ssm"
    with pytest.raises(UserError, match="needs an NVIDIA GPU, not 'cpu'"):
        backends.resolve_backend("mamba_ssm", "cpu")


@pytest.mark.parametrize("error", [OSError("libcudart.so.12: cannot open"), RuntimeError("no driver"), AttributeError])
def test_mamba_ssm_built_for_another_machine_is_absent(error, monkeypatch):
    def broken(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(mamba_ssm, "import_module", broken)
    assert mamba_ssm.missing().startswith("needs selective_scan_cuda (")
    with pytest.raises(UserError, match="pip install"):
        backends.resolve_backend("mamba_ssm", "cuda")


@pytest.fixture
def published_kernels(monkeypatch):
    """The published functions' signatures and layouts, (B, E, L) and left-to-right, over the definition."""

    def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
        assert all(t.is_contiguous() for t in (u, delta, B, C))
        tensors = [None if t is None else t.mT for t in (u, delta, B, C, z)]
        u, delta, B, C, z = tensors
        y, state = naive.selective_scan(ScanOperands(u, delta, A, B, C, D, z, delta_bias), delta_softplus, False, None)
        return y.mT, state.detach()

    def causal_conv1d_fn(x, weight, bias=None, *, activation=None):
        return naive.causal_conv1d(x.mT, weight, bias, activation, False).mT

    interface = ModuleType("mamba_ssm.ops.selective_scan_interface")
    interface.selective_scan_fn = selective_scan_fn
    conv = ModuleType("causal_conv1d")
    conv.causal_conv1d_fn = causal_conv1d_fn
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    monkeypatch.setitem(sys.modules, conv.__name__, conv)


@pytest.mark.parametrize("reverse", [False, True])
def test_mamba_ssm_is_adapted_to_our_layout_and_directions(published_kernels, reverse):
    generator = torch.Generator().manual_seed(0)
    u, dt, z = (torch.randn(2, 9, 4, generator=generator, requires_grad=True) for _ in range(3))
    B, C = (torch.randn(2, 9, 3, generator=generator, requires_grad=True) for _ in range(2))
    A, D, bias = -torch.rand(4, 3, generator=generator), torch.randn(4), torch.randn(4)
    args = (ScanOperands(u, dt, A, B, C, D, z, bias), True, reverse, None)
    (y, state), (expected, end) = mamba_ssm.selective_scan(*args), naive.selective_scan(*args)
    torch.testing.assert_close((y, state), (expected, end))
    gradients, right = (torch.autograd.grad(t.sin().sum(), [u, dt, B, C, z]) for t in (y, expected))
    torch.testing.assert_close(gradients, right)
    weight = torch.randn(4, 3, generator=generator)
    conv = (u, weight, bias, "silu", reverse)
    torch.testing.assert_close(mamba_ssm.causal_conv1d(*conv), naive.causal_conv1d(*conv))


def test_mamba_ssm_refuses_what_it_would_get_wrong(published_kernels):
    u = torch.randn(1, 4, 2, requires_grad=True)
    A, BC = -torch.rand(2, 3), torch.randn(1, 4, 3)
    given = ScanOperands(u, u, A, BC, BC)
    with pytest.raises(UserError, match="takes no initial state"):
        mamba_ssm.selective_scan(given, True, False, torch.zeros(1, 2, 3))
    _, state = mamba_ssm.selective_scan(given, True, False, None)
    with pytest.raises(UserError, match="no gradient of the final state"):
        state.sum().backward()
    long = torch.empty(1, device="meta").expand(2**11, 2**20, 2**5)
    with pytest.raises(UserError, match="overflow"):
        mamba_ssm.causal_conv1d(long, torch.randn(2, 4), None, "silu", False)
    with pytest.raises(UserError, match="overflow"):
        mamba_ssm.selective_scan(ScanOperands(long, long, -torch.rand(2**5, 2**7), BC, BC), True, False, None)
