"""Bytes behind a local path or a URL, read once from the beginning. Imports no torch.

`http:` and `https:` by the standard library, `pipe:COMMAND` by a shell, every other scheme (`s3:`, `gs:`, …) by fsspec
and its plug-in of that scheme.
"""

import shlex
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from typing import BinaryIO

import fsspec

from caduceus.errors import UserError

TIMEOUT = 60
"""Seconds without a byte after which an http server is given up."""
_CHUNK = 4 << 20


def is_remote(path: str) -> bool:
    return path.startswith("pipe:") or "://" in path


def join(base: str, name: str) -> str:
    """Address of a file in a directory. In `pipe:COMMAND`, the file's name stands for `{}`."""
    if base.startswith("pipe:"):
        if "{}" not in base:
            raise UserError(f"data.path: '{base}' needs {{}} where the name of the file belongs")
        return base.replace("{}", shlex.quote(name))
    return f"{base.rstrip('/')}/{urllib.parse.quote(name) if is_remote(base) else name}"


def read_chunks(address: str) -> Iterator[bytes]:
    """The bytes of a file, piece by piece. Whatever fails is an `OSError` that names the address."""
    try:
        with _open(address) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except (HTTPException, OSError) as error:
        raise OSError(f"{address}: {error}") from error


@contextmanager
def _open(address: str) -> Iterator[BinaryIO]:
    if address.startswith("pipe:"):
        with subprocess.Popen(address.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE) as process:
            yield process.stdout
        if process.returncode:
            raise OSError(f"the command ended with status {process.returncode}")
    elif address.startswith(("http://", "https://")):
        with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
            yield response
            if response.length:
                raise OSError(f"the connection ended {response.length} bytes early")
    else:
        try:
            opened = fsspec.open(address, "rb").open()
        except (ImportError, ValueError) as error:  # no plug-in of this scheme is installed, or there is none
            raise UserError(f"{address}: {error}") from None
        with opened as file:
            yield file
