"""What the process that ranks are forked from imports: all that a rank would spend its first seconds on."""

import contextlib

import torch
import torch._inductor.compile_fx  # by DeepSpeed's optimizers

import caduceus.train.trainer  # noqa: F401
import tests.distributed.layouts  # noqa: F401
from caduceus import CaduceusConfig, CaduceusForMaskedLM
from caduceus.distributed.deepspeed.package import import_deepspeed

with contextlib.suppress(ImportError):
    import_deepspeed("cpu")
# Kernels are compiled, or read from numba's cache, at their first use. One thread: others would not survive a fork.
torch.set_num_threads(1)
for dtype in (torch.float32, torch.float64):
    model = CaduceusForMaskedLM(CaduceusConfig(d_model=8, n_layer=1, d_state=2, rcps=True), backend="cpu").to(dtype)
    model(torch.full((1, 8), 7), torch.full((1, 8), 7), return_logits=False).loss.backward()
