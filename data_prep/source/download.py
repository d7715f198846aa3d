"""Downloads a file or a genome of the registry, with resuming, checksums and progress."""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from caduceus.data.remote import failure_reason
from caduceus.errors import UserError
from caduceus.files import locked, write_atomically
from caduceus.patience import exists, is_file, patiently
from data_prep.progress import Progress, note
from data_prep.source.registry import GenomeSpec

CHUNK = 16 << 20
"""Bytes that are requested at once, and the most that is held in memory."""
ATTEMPTS = 5
"""Failures in a row without any data after which a download is given up."""
FIRST_WAIT = 1.0
"""Seconds before the second attempt; doubled before each further one."""
_VERSION_KEYS = ("size", "ETag", "Last-Modified", "LastModified", "modify", "mtime")


def fetch(url: str, directory: str | Path, sha256: str | None = None, md5: str | None = None) -> Path:
    """The file at a local path or an http, https, ftp or s3 URL, downloaded into `directory` unless it is there.

    A partial download is kept as `.NAME.part`, and the next call continues it; the final name appears only when all
    bytes have come and the checksums are right. A local path is checked and returned. Raises `UserError` for every
    failure.
    """
    if urlsplit(url).scheme in ("", "file"):
        path = Path(unquote(urlsplit(url).path) if url.startswith("file:") else url)
        if not is_file(path):
            raise UserError(f"{path}: no such file")
        verify_file(path, sha256, md5)
        return path
    name = unquote(Path(urlsplit(url).path).name)
    if not name:
        raise UserError(f"{url}: names no file; give the URL of a genome file")
    target = Path(directory) / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f".{name}.part")) as partial:
            if exists(target):
                verify_file(target, sha256, md5)
            else:
                _download(url, partial)
                verify_file(Path(partial.name), sha256, md5, arrives_as=target)
                Path(partial.name).rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None
    return target


def fetch_cached(url: str, cache_dir: Path) -> Path:
    """The file behind a URL, downloaded once into the cache directory.

    Each address has its own folder there, as other addresses may end in the same name.
    """
    return fetch(url, cache_dir / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16])


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """The partial file, opened to append and locked; a second process waits. Afterwards it is removed if it
    is empty.
    """
    with locked(path) as partial:
        try:
            yield partial
        finally:
            if not os.fstat(partial.fileno()).st_size:
                path.unlink(missing_ok=True)
            if not exists(path):
                _version_path(partial).unlink(missing_ok=True)


def fetch_genome(genome: GenomeSpec, directory: str | Path) -> Path:
    """The file of a registry entry: its local file, or a download from the first of its URLs that works."""
    if genome.fasta is not None:
        return fetch(str(genome.fasta), directory, genome.sha256, genome.md5)
    for url in genome.urls[:-1]:
        try:
            return fetch(url, directory, genome.sha256, genome.md5)
        except UserError as error:
            note(f"{error}; trying the next address")
    return fetch(genome.urls[-1], directory, genome.sha256, genome.md5)


def _download(url: str, partial: BinaryIO) -> None:
    """Append the missing bytes to `partial`, with retries; it begins anew if the remote file has changed."""
    filesystem, path = _open_filesystem(url)
    try:
        info = filesystem.info(path)
    except Exception as error:  # each file system of fsspec raises its own classes
        raise UserError(f"{url}: {failure_reason(error)}") from None
    size = info.get("size")
    version = {"url": url} | {key: str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None}
    if not _continues(partial, version):
        partial.truncate(0)
        write_atomically(_version_path(partial), json.dumps(version).encode())
    partial.seek(0, os.SEEK_END)
    with Progress(f"downloading {Path(path).name}", size) as progress:
        progress.add(partial.tell())
        failures, resumes = 0, True
        while size is None or partial.tell() < size:
            before = partial.tell()
            try:
                _append(filesystem, path, partial, size, progress)
                break
            except _WriteError as error:
                raise error.__cause__ from None
            except _NoRanges:
                resumes = False
                partial.truncate(0)
                partial.seek(0)
                progress.add(-before)
            except Exception as error:  # as above
                failures = 1 if resumes and partial.tell() > before else failures + 1
                if failures == ATTEMPTS:
                    raise UserError(f"{url}: {failure_reason(error)}; run the command again to continue") from None
                time.sleep(FIRST_WAIT * 2 ** (failures - 1))
    if size is not None and partial.tell() != size:
        raise UserError(f"{url}: got {partial.tell():,} of {size:,} bytes; run the command again to continue")
    partial.flush()
    os.fsync(partial.fileno())


class _WriteError(Exception):
    """The local disk failed, not the network; `__cause__` is the `OSError`."""


class _NoRanges(Exception):
    """The server sends whole files only."""


def _append(filesystem: Any, path: str, partial: BinaryIO, size: int | None, progress: Progress) -> None:
    start = partial.tell()
    # For fsspec's http, block size 0 means one request for the whole file, which cannot begin in its middle.
    streams = not start and path.startswith("http")
    with filesystem.open(path, "rb", block_size=0 if streams else CHUNK, cache_type="none") as remote:
        while size is None or partial.tell() < size:
            try:
                if start and partial.tell() == start:
                    remote.seek(start)
                piece = remote.read(CHUNK if size is None else min(CHUNK, size - partial.tell()))
            except ValueError as error:
                raise _NoRanges from error
            if not piece:
                if size is not None:
                    raise EOFError(f"the connection ended at byte {partial.tell():,} of {size:,}")
                return
            try:
                partial.write(piece)
                partial.flush()
            except OSError as error:
                raise _WriteError from error
            progress.add(len(piece))


def _open_filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    scheme = urlsplit(url).scheme
    options: dict[str, Any] = {"skip_instance_cache": True}
    try:
        if scheme in ("http", "https"):
            import aiohttp

            # The whole transfer has no time limit; a connection without data is given up.
            options["client_kwargs"] = {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}.get(scheme)
        advice = f"pip install {package}" if package else str(error)
        raise UserError(f"{url}: {scheme} needs a package that is not installed; {advice}") from None
    except ValueError:
        raise UserError(f"{url}: unknown kind of address '{scheme}'; http, https, ftp and s3 are known") from None
    except Exception as error:  # ftp connects here
        raise UserError(f"{url}: {failure_reason(error)}") from None


def _continues(partial: BinaryIO, version: dict[str, str]) -> bool:
    """Whether `partial` is the beginning of the file that the server has now."""
    try:
        return json.loads(_version_path(partial).read_bytes()) == version
    except (OSError, ValueError):
        return False


def _version_path(partial: BinaryIO) -> Path:
    return Path(f"{partial.name}.json")


def verify_file(path: Path, sha256: str | None, md5: str | None, *, arrives_as: Path | None = None) -> None:
    """Check a file's checksums. Raises `UserError` where one is wrong, and then removes a download that would become
    `arrives_as`.
    """
    for algorithm, expected in (("sha256", sha256), ("md5", md5)):
        if expected is None:
            continue
        found = _digest(path, algorithm)
        if found == expected.lower():
            continue
        advice = "delete it and run the command again"
        if arrives_as is not None:
            path.unlink()
            advice = "nothing was kept; run the command again, or correct the checksum"
        raise UserError(f"{arrives_as or path}: {algorithm} is {found}, expected {expected.lower()}; {advice}")


def _digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as file, Progress(f"verifying {path.name}", patiently(path.stat).st_size) as progress:
        while piece := file.read(CHUNK):
            digest.update(piece)
            progress.add(len(piece))
    return digest.hexdigest()
