"""That a kernel whose registers do not suffice is told from one whose do."""

import pytest

from tests.ops.test_aot import check
from tests.ops.tools import has_tools

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
