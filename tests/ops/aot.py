"""Compiles the Triton kernels ahead of time for GPUs that are not here, and reads what ptxas made of them.

Run as a program in a process of its own (Triton must not be interpreting), with compute capability, element type,
number of states and, unless it is to be all, names of kernels: prints one JSON object per kernel.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from caduceus.ops.triton import conv_kernels, cross_entropy_kernels, norm_kernels, scan_backward_kernels, scan_kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
IN_FP32 = {"A_ptr", "D_ptr", "bias_ptr", "w_ptr", "weight_ptr", "state_ptr", "sum_dt_ptr", "first_ptr", "last_ptr"} | {
    f"{name}_ptr"
    for name in ("adjoint", "kept", "dA", "dB", "dC", "dD", "dbias", "dw", "dweight", "sums", "dloss", "loss_weight")
}
PACKED = " of packed sequences"
SHARED = " of sequences shared by ranks"
INTEGER = {"starts_ptr": "*u8", "label_ptr": "*i64", "eps": "fp32"}


def compile_kernel(kernel, constants: dict, capability: int, element: str):
    """As a launch with 16-byte aligned tensors and channel counts that are multiples of 16 compiles it."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = INTEGER.get(name, "*fp32" if name in IN_FP32 else f"*{element}")
        else:
            signature[name] = INTEGER.get(name, "i32")
        if name.endswith(("_ptr", "_row", "_token")) or name in ("E", "D"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


def resources(compiled) -> dict:
    """Registers, stack and shared bytes, and spilling instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])

        def dump(option: str) -> str:
            return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout

        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", dump("--dump-resource-usage")).groups()
        instructions = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+ )?([A-Z0-9]+)", dump("-sass"), re.MULTILINE)
    return {
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
        "local_memory": sum(name in ("LDL", "STL") for name in instructions),
        "instructions": len(instructions),
        "narrow_products": narrow_products(compiled.asm["ttir"]),
    }


def narrow_products(ttir: str) -> list[str]:
    """Lines of Triton's IR that multiply, or add to a pointer, a 32-bit value made from the program's number on axis 0.

    That number counts rows, chunks or tokens, the only things that grow without bound: its products with sizes and
    strides pass 2^31. All else (a channel, a state, a step within a chunk) is bounded where the kernel is launched.
    """
    narrow, found = set(), []
    for line in ttir.splitlines():
        result, _, operation = line.partition(" = ")
        if "scf.for" in line:
            result, operation = re.search(r"scf\.for (%\S+) = (%\S+) to", line).groups()
        elif "tt.get_program_id x" in line:
            narrow.add(result.strip())
            continue
        if narrow.isdisjoint(re.findall(r"%[\w#]+", operation)) or "arith.extsi" in operation:
            continue
        if re.match(r"arith\.muli|tt\.addptr", operation):
            found.append(line.strip())
        elif not operation.startswith("arith.cmpi"):
            narrow.add(result.strip())
    return found


def scan_constants(states: int, element: str) -> dict[str, tuple]:
    tile = {"N": states, "CHUNK": 256, "BLOCK": 128, "SOFTPLUS": True, "HAS_BIAS": True, "HAS_STARTS": False}
    gate, piece = {"HAS_Z": True}, {"T": 8}
    skip = gate | {"HAS_D": True}
    total = {"LOG_COLUMNS": 4, "IN_FP32": element == "fp32"}
    kernels = {
        "chunk_state": (scan_kernels.chunk_state_kernel, tile),
        "chunk_carry": (scan_kernels.chunk_carry_kernel, {"N": states, "BLOCK": 128, "AHEAD": 8, "HAS_FIRST": False}),
        "scan_forward": (scan_kernels.scan_forward_kernel, tile | skip),
        "chunk_adjoint": (scan_backward_kernels.chunk_adjoint_kernel, tile | gate),
        "scan_replay": (scan_backward_kernels.scan_replay_kernel, tile | skip | piece),
        "scan_backward": (scan_backward_kernels.scan_backward_kernel, tile | skip | piece | total),
    }
    packed = {
        f"{name}{PACKED}": (kernels[name][0], kernels[name][1] | {"HAS_STARTS": True})
        for name in ("chunk_state", "scan_forward", "chunk_adjoint", "scan_replay")
    }
    carry, constants = kernels["chunk_carry"]
    return kernels | packed | {f"chunk_carry{SHARED}": (carry, constants | {"HAS_FIRST": True})}


def other_constants(element: str) -> dict[str, tuple]:
    conv = {"K": 4, "TOKENS": 16, "BLOCK": 64, "SILU": True, "HAS_BIAS": True, "HAS_HALO": False, "HAS_STARTS": False}
    shared = conv | {"HAS_HALO": True, "BLOCK": 32 if element == "fp32" else 64}
    norm = {"ROWS": 8, "BLOCK": 256, "LAYER_NORM": False}
    entropy = {"ROWS": 32, "VB": 16, "DB": 64, "HAS_WEIGHTS": True}
    return {
        "conv_forward": (conv_kernels.conv_forward_kernel, conv),
        "conv_backward": (conv_kernels.conv_backward_kernel, conv | {"OF_HALO": False}),
        f"conv_forward{SHARED}": (conv_kernels.conv_forward_kernel, shared),
        f"conv_backward{SHARED}": (conv_kernels.conv_backward_kernel, shared | {"OF_HALO": False}),
        f"conv_backward of the halo{SHARED}": (conv_kernels.conv_backward_kernel, shared | {"OF_HALO": True}),
        "add_norm_forward": (norm_kernels.add_norm_forward_kernel, norm | {"HAS_RESIDUAL": True}),
        "add_norm_backward": (norm_kernels.add_norm_backward_kernel, norm | {"HAS_DTOTAL": True}),
        "cross_entropy_forward": (cross_entropy_kernels.cross_entropy_forward_kernel, entropy),
        "cross_entropy_backward": (cross_entropy_kernels.cross_entropy_backward_kernel, entropy),
    }


def main() -> None:
    capability, element, states, *names = sys.argv[1:]
    capability, states = int(capability), int(states)
    kernels = scan_constants(states, element) | other_constants(element)
    for name in names or kernels:
        kernel, constants = kernels[name]
        compiled = compile_kernel(kernel, constants, capability, element)
        print(json.dumps({"kernel": name} | resources(compiled)), flush=True)


if __name__ == "__main__":
    main()
