"""The ops in Triton, for NVIDIA GPUs; with TRITON_INTERPRET=1 they run, slowly, on CPU tensors."""

from caduceus.ops.triton.conv import bidirectional_conv1d, causal_conv1d
from caduceus.ops.triton.scan import bidirectional_scan, selective_scan

__all__ = ["bidirectional_conv1d", "bidirectional_scan", "causal_conv1d", "selective_scan"]
