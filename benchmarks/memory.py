"""What a block keeps for its backward pass on a GPU: bytes per token and layer, and what whole models then need.

    python benchmarks/memory.py [--d-model 256] [--layers 16] [--length 131072]

Needs no GPU and no memory: the real model runs on fake tensors, with the Triton backend's own shapes, in bf16 autocast;
every tensor that autograd saves is counted once by its storage. Beside it stands what the tensor's axes multiply to.
"""

import argparse
import os

os.environ["TRITON_INTERPRET"] = "1"  # lets the Triton backend stand on the CPU; its kernels are not run here

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from caduceus.config import CaduceusConfig
from caduceus.model.caduceus import CaduceusForMaskedLM
from caduceus.train.memory import kept_tensors, stored_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--length", type=int, default=131_072)
    options = parser.parse_args()
    for name, rcps in (("Caduceus-Ph", False), ("Caduceus-PS", True)):
        config = CaduceusConfig(d_model=options.d_model, n_layer=options.layers, rcps=rcps)
        print_block(name, config, options.length)


def print_block(name: str, config: CaduceusConfig, length: int) -> None:
    saved = saved_by_a_block(config, length)
    print(f"{name}, d_model {config.d_model}, d_inner {config.d_inner}, {config.d_state} states, bf16\n")
    print("| kept by a block | type | elements per token | bytes per token |\n|---|---|---|---|")
    for tensor in saved:
        axes, dtype = "·".join(map(str, tensor.shape)), str(tensor.dtype).removeprefix("torch.")
        print(f"| {axes} | {dtype} | {tensor.numel() / length:,.1f} | {stored_bytes(tensor) / length:,.1f} |")
    per_token = sum(stored_bytes(tensor) for tensor in saved) / length
    residual = (2 if config.rcps else 1) * config.d_model * 4
    print(
        f"| all | | | {per_token:,.0f} |\n\n| length | GiB, all blocks kept | GiB, with checkpointing |\n|---|---|---|"
    )
    for bases in (1024, 32_768, 131_072, 1_048_576):
        kept = bases * config.n_layer * per_token / 2**30
        checkpointed = bases * (config.n_layer * residual + per_token) / 2**30
        print(f"| {bases:,} | {kept:,.1f} | {checkpointed:,.1f} |")
    print("\nActivations alone: the backward pass of one block adds its gradients and scratch on top.\n")


def saved_by_a_block(config: CaduceusConfig, length: int) -> list[Tensor]:
    """Tensors that autograd keeps of the sequence in one block, one per storage, largest first."""
    with FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
        block = CaduceusForMaskedLM(config, backend="triton").blocks[0]
        shape = (2 if config.rcps else 1, 1, length, config.d_model)
        residual = torch.empty(shape, requires_grad=True)
        hidden = torch.empty(shape, requires_grad=True, dtype=torch.bfloat16)
        kept = kept_tensors(block, hidden, residual)
    # What is smaller is made of parameters, whatever the length.
    return sorted((tensor for tensor in kept if tensor.numel() >= length), key=stored_bytes, reverse=True)


if __name__ == "__main__":
    main()
