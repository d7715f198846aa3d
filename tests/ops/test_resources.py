"""A kernel whose registers do not suffice is told from one whose do; what is on record of the releases of Triton."""

import json
import re

import pytest

from tests.conftest import REPOSITORY
from tests.ops.test_aot import BEYOND, REGISTERS, check, check_blocks, most_registers
from tests.ops.tools import RECORDS, has_tools

triton = pytest.importorskip("triton", reason="triton is not installed (Linux only)")
tl = triton.language

pytestmark = pytest.mark.skipif(not has_tools(), reason="no triton here that brings ptxas and cuobjdump (Linux only)")


@triton.jit
def backwards(x_ptr, stride):
    """Each thread holds 48 numbers, as any store may change what is loaded after it."""
    at = x_ptr + tl.arange(0, 128)
    numbers = ()
    for n in tl.static_range(48):
        numbers = numbers + (tl.load(at + n * stride),)
    for n in tl.static_range(48):
        tl.store(at + n * stride, numbers[47 - n])


@pytest.mark.moderate
@pytest.mark.parametrize("capability", [80, 90])
def test_a_kernel_that_spills_is_found(capability):
    from tests.ops.aot import resources

    def compile_for(registers: int | None) -> dict:
        source = triton.compiler.ASTSource(backwards, {"x_ptr": "*fp32", "stride": "i32"})
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        options = {"num_warps": 4, "enable_fp_fusion": True, "maxnreg": registers}
        return {"kernel": "backwards"} | resources(triton.compile(source, target=target, options=options))

    registers = {"backwards": 255}
    check([compile_for(None)], registers)
    spilling = compile_for(32)
    assert spilling["stack"] > 0 and spilling["local"] > 0
    for other in ("stack", "local"):  # each of the two is enough
        with pytest.raises(AssertionError, match="spills"):
            check([spilling | {other: 0}], registers)


@pytest.fixture(scope="module")
def records() -> dict[str, list[dict]]:
    """Kernels by release."""
    known = {path.stem: json.loads(path.read_text()) for path in RECORDS.glob("*.json")}
    return {release: [kernel | {"key": key} for key, kernel in rows.items()] for release, rows in known.items()}


def test_the_oldest_release_that_is_allowed_is_on_record_and_another(records):
    (oldest,) = re.findall(r'"triton>=([\d.]+)', (REPOSITORY / "pyproject.toml").read_text())
    assert f"{oldest}.0" in records and len(records) > 1


def test_kernels_on_record_keep_to_the_bounds(records):
    for release, kernels in records.items():
        assert {kernel["kernel"] for kernel in kernels} == set(REGISTERS), release
        for kernel in kernels:
            check([kernel], most_registers(kernel["run"]))
    (oldest,) = (kernels for release, kernels in records.items() if release == "3.6.0")
    assert {kernel["key"] for kernel in oldest} >= BEYOND


def test_as_many_blocks_share_a_multiprocessor_whatever_the_release(records):
    of = {"capability": 80, "element": "bf16", "run": "one"}
    for kernels in records.values():
        check_blocks([kernel for kernel in kernels if of.items() <= kernel.items()])
