"""What the benchmarks for GPUs share. Import it before `caduceus`, whose imports load Triton.

Without a GPU, Triton's kernels run in its interpreter, which is chosen when Triton is loaded.
"""

import argparse
import gc
import os
import sys
from importlib.util import find_spec
from typing import NoReturn

import torch
from machine import processor

if find_spec("triton") is None:
    print("no triton here (Linux only): nothing to do")
    sys.exit(0)

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


class CommandLine(argparse.ArgumentParser):
    """With `--device`; what is wrong with the arguments is said in one line, with exit status 2."""

    def __init__(self, description: str | None) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.add_argument("--device", choices=["cuda", "cpu"], default="cuda")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")

    def parse_or_leave(self) -> argparse.Namespace:
        """The options; says so and exits with status 0 where they want a GPU and there is none."""
        options = self.parse_args()
        if options.device == "cuda":
            if not torch.cuda.is_available():
                print("no GPU here: nothing to do (--device cpu runs the program itself, at toy sizes)")
                self.exit(0)
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        elif os.environ.get("TRITON_INTERPRET") != "1":
            self.error("--device cpu: set TRITON_INTERPRET=1 where there is a GPU")
        return options


def positive(text: str) -> int:
    """A positive whole number of the command line."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def device_name(device: str) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name() if device == "cuda" else processor()


def give_memory_back(device: str) -> None:
    """To the GPU, from what nothing refers to any more; after a lack of memory cycles may hold a lot."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
