"""The CPU backend: selective scan and causal convolution as torch operators over numba kernels.

Takes what `naive` takes and means the same. Half precision is computed in float32 and returned in the input's type;
float64 stays float64, more slowly. Kernels run on `torch.get_num_threads()` threads and give the same bits for any
number of them. Compiled code is kept on disk (NUMBA_CACHE_DIR, or beside the kernels, or in the user's cache).
"""

from caduceus.ops.cpu.conv import bidirectional_conv1d, causal_conv1d
from caduceus.ops.cpu.scan import SlicedScan, bidirectional_scan, selective_scan

__all__ = ["SlicedScan", "bidirectional_conv1d", "bidirectional_scan", "causal_conv1d", "selective_scan"]
