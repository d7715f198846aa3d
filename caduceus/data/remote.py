"""Reads the bytes of a local path or a URL once, from the beginning. Imports no torch.

The standard library reads `http:` and `https:`, a shell runs `pipe:COMMAND`, and fsspec with its plug-ins reads every
other scheme (`s3:`, `gs:`, …). No part of an address reaches a shell, except the COMMAND of a pipe.
"""

import logging
import shlex
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import fsspec

from caduceus.errors import UserError

log = logging.getLogger(__name__)

TIMEOUT = 30
"""Seconds without a byte after which reading from an http server fails."""
_CHUNK = 4 << 20
_PASSING_STATUSES = (408, 425, 429)
"""Status codes of http that mean "ask again later"."""


class RemoteError(OSError):
    """A file was not available. The message is one line: the address, what went wrong and what to do."""


class RefusalError(RemoteError):
    """The answer is final, because the file is absent or may not be read: asking again at once does not help."""


def is_remote(path: str) -> bool:
    return path.startswith("pipe:") or "://" in path


def join(base: str, name: str) -> str:
    """Address of the file `name` in the directory `base`. In `pipe:COMMAND`, the name replaces `{}`."""
    if base.startswith("pipe:"):
        if "{}" not in base:
            raise UserError(f"data.path: '{base}' needs {{}} where the name of the file belongs")
        return base.replace("{}", shlex.quote(name))
    return f"{base.rstrip('/')}/{urllib.parse.quote(name) if is_remote(base) else name}"


def refuse_commands(addresses: Iterable[str], allowed: bool, key: str) -> None:
    """Raise `UserError` where an address would run a command that the user has not allowed; `key`: whose value they
    are.

    A configuration file may be somebody else's. A chain of fsspec's file systems counts as a command, because some of
    them run code that they find in a file.
    """
    for address in addresses:
        if not allowed and (address.startswith("pipe:") or "::" in address):
            raise UserError(
                f"{key}: '{address}' runs a command on this machine; if you trust it, give all such addresses on the "
                "command line (data.path, data.valid_path), or data.allow_commands=true"
            )


def log_commands(addresses: Iterable[str]) -> None:
    """Log the commands that addresses run."""
    for address in addresses:
        if address.startswith("pipe:"):
            log.info("data: runs the command: %s", address.removeprefix("pipe:"))


def read_chunks(address: str) -> Iterator[bytes]:
    """The bytes of a file, piece by piece. Raises `RemoteError` for every failure."""
    try:
        with open_address(address) as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except UserError:
        raise
    except Exception as error:  # each file system of fsspec raises its own classes
        kind = RefusalError if _is_final(error) else RemoteError
        raise kind(f"{address}: {reading_problem(address, error)}") from error


def reading_problem(address: str, error: Exception) -> str:
    """One line about what went wrong while the file at an address was read."""
    if is_remote(address):
        return failure_reason(error)
    return " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__


def failure_reason(error: Exception) -> str:
    """One line about a failure of the network, and what to do."""
    error = _root(error)
    status = _status(error)
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, FileNotFoundError | StopIteration) or status == 404:  # fsspec's ftp raises StopIteration
        return f"not found on the server{' (404)' if status == 404 else ''}; check the address"
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"the server refuses access ({status or text}); check the address and your credentials"
    if _lacks_credentials(error):
        return f"no access to the server ({text}); check your credentials"
    return f"cannot be downloaded ({text}); check the address and the network"


def _is_final(error: Exception) -> bool:
    error = _root(error)
    if isinstance(error, FileNotFoundError | PermissionError) or _lacks_credentials(error):
        return True
    return 400 <= (_status(error) or 0) < 500 and _status(error) not in _PASSING_STATUSES


def _root(error: Exception) -> Exception:
    """The error itself, or the one that it hides: fsspec's http reports every failure as a missing file."""
    hides = isinstance(error, FileNotFoundError) and isinstance(error.__cause__, Exception)
    return error.__cause__ if hides else error


def _status(error: Exception) -> int | None:
    """The status of an http answer, from an exception of urllib, aiohttp or botocore."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(error, "status", None)


def _lacks_credentials(error: Exception) -> bool:
    """Whether botocore or google-auth found no credentials. Classes are compared by name, as neither package need be
    installed.
    """
    return "Credential" in type(error).__name__


@contextmanager
def open_address(address: str) -> Iterator[BinaryIO]:
    """A file to read once, from its beginning. Raises whatever its file system raises, also at the end of the block."""
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
        except (ImportError, ValueError) as error:  # no plug-in for this scheme is installed, or none exists
            raise UserError(f"{address}: {error}") from None
        with opened as file:
            yield file
