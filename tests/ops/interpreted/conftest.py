"""Tests of the Triton kernels on the CPU. Triton decides when it is imported whether it interprets, so these run in a
process of their own with TRITON_INTERPRET=1, which test_triton.py starts; elsewhere they are not collected."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
