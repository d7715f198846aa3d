"""The structure of the published Caduceus as a peer: two Mambas per block, the second on a flipped copy.

Caduceus-PS runs both again on the reverse complement, with positions and channels flipped. The scan and the convolution
come from a backend of `caduceus.ops`: mamba_ssm if it is installed, otherwise the same kernels as this package's own
model, so that only the structure differs. Parameter count and arithmetic are the published ones; it is a load for
timing, not a checkpoint. It is not the published package: that one fuses the residual add with the norm, and runs a
whole Mamba as one function, which recomputes the convolution and the step sizes in the backward pass. Here autograd
keeps all of it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from caduceus.config import CaduceusConfig
from caduceus.ops import causal_conv1d, selective_scan


class Mamba(nn.Module):
    """One direction. The in and out projections are given, for they are shared between the directions."""

    def __init__(self, config: CaduceusConfig, in_proj: nn.Linear, out_proj: nn.Linear, backend: str) -> None:
        super().__init__()
        E, N, rank = config.d_inner, config.d_state, config.dt_rank
        self.splits, self.backend = [rank, N, N], backend
        self.in_proj, self.out_proj = in_proj, out_proj
        self.conv = nn.Conv1d(E, E, config.d_conv, groups=E)
        self.x_proj = nn.Linear(E, rank + 2 * N, bias=False)
        self.dt_proj = nn.Linear(rank, E)
        self.A_log = nn.Parameter(torch.arange(1.0, N + 1).log().repeat(E, 1))
        self.D = nn.Parameter(torch.ones(E))

    def forward(self, hidden: Tensor) -> Tensor:
        x, z = self.in_proj(hidden).chunk(2, dim=-1)
        u = causal_conv1d(x, self.conv.weight[:, 0], self.conv.bias, backend=self.backend)
        dt, B, C = self.x_proj(u).split(self.splits, dim=-1)
        dt, A = F.linear(dt, self.dt_proj.weight), -self.A_log.exp()
        y = selective_scan(u, dt, A, B, C, self.D, z, self.dt_proj.bias, backend=self.backend)
        return self.out_proj(y)


class PublishedBlock(nn.Module):
    def __init__(self, config: CaduceusConfig, backend: str) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)
        in_proj = nn.Linear(config.d_model, 2 * config.d_inner, bias=False)
        out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)
        self.left_to_right, self.right_to_left = (Mamba(config, in_proj, out_proj, backend) for _ in range(2))

    def forward(self, residual: Tensor) -> Tensor:
        hidden = self.norm(residual)
        return self.left_to_right(hidden) + self.right_to_left(hidden.flip(1)).flip(1)


class PublishedStructure(nn.Module):
    """input_ids (B, L), labels (B, L) -> loss over all positions, (B, L, V) logits in fp32, as the published code."""

    def __init__(self, config: CaduceusConfig, backend: str, recomputed_blocks: bool = False) -> None:
        super().__init__()
        self.config, self.recomputed_blocks = config, recomputed_blocks
        self.embedding = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.blocks = nn.ModuleList(PublishedBlock(config, backend) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.d_model, eps=config.norm_epsilon)

    def forward(self, input_ids: Tensor, labels: Tensor, ignore_label: int) -> Tensor:
        streams = [self.embedding(input_ids)]
        if self.config.rcps:
            streams.append(streams[0].flip(1, 2))
        for block in self.blocks:
            for i, residual in enumerate(streams):
                if self.recomputed_blocks:
                    streams[i] = residual + checkpoint(block, residual, use_reentrant=False)
                else:
                    streams[i] = residual + block(residual)
        logits = F.linear(self.norm(streams[0]), self.embedding.weight)
        if self.config.rcps:
            logits = logits + F.linear(self.norm(streams[1]).flip(1, 2), self.embedding.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=ignore_label)
