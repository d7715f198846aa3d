"""The ops in Triton, for NVIDIA GPUs; with TRITON_INTERPRET=1 they run, slowly, on CPU tensors."""

from caduceus.ops.triton.conv import TOKENS, bidirectional_conv1d, causal_conv1d
from caduceus.ops.triton.cross_entropy import head_cross_entropy
from caduceus.ops.triton.gated import gated_norm
from caduceus.ops.triton.norm import add_norm
from caduceus.ops.triton.scan import MAX_STATES, bidirectional_scan, scan_with_states, selective_scan
from caduceus.ops.triton.sliced_scan import SlicedScan
from caduceus.ops.triton.ssd import SlicedSSD, ssd_scan, takes_ssd

__all__ = [
    "SUPPORTED",
    "SlicedSSD",
    "SlicedScan",
    "add_norm",
    "bidirectional_conv1d",
    "bidirectional_scan",
    "causal_conv1d",
    "gated_norm",
    "head_cross_entropy",
    "scan_with_states",
    "selective_scan",
    "ssd_scan",
    "takes_ssd",
]

SUPPORTED = {"d_state": range(1, MAX_STATES + 1), "d_conv": range(1, TOKENS + 1)}
"""The sizes of models that the kernels accept."""
