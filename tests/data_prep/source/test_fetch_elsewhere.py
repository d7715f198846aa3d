"""Downloads from an S3 bucket and from an FTP server on this computer, by their real clients."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from caduceus.errors import UserError
from data_prep.source import download
from data_prep.source.download import fetch
from tests.object_store import s3_bucket

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
NAME = "genome.fa.gz"


@pytest.fixture
def ftp(tmp_path: Path) -> Iterator[str]:
    """URL of a folder on an FTP server that holds the genome."""
    from pyftpdlib.authorizers import DummyAuthorizer
    from pyftpdlib.handlers import FTPHandler
    from pyftpdlib.servers import ThreadedFTPServer

    folder = tmp_path / "served"
    folder.mkdir()
    (folder / NAME).write_bytes(CONTENT)
    authorizer = DummyAuthorizer()
    authorizer.add_anonymous(str(folder))
    handler = type("Handler", (FTPHandler,), {"authorizer": authorizer})
    server = ThreadedFTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"timeout": 0.05, "handle_exit": False}, daemon=True)
    thread.start()
    yield f"ftp://127.0.0.1:{server.address[1]}"
    server.close_all()
    thread.join(5)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with s3_bucket(monkeypatch, {NAME: CONTENT}) as url:
        yield url


@pytest.fixture(params=["s3", "ftp"])
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(download, "CHUNK", 1 << 16)
    return request.getfixturevalue(request.param)


@pytest.mark.moderate
def test_downloads_whole_and_goes_on_with_a_part(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch(f"{folder}/{NAME}", tmp_path / "whole").read_bytes() == CONTENT
    append = download._append

    def stop_after_the_first_piece(filesystem, path, partial, size, progress):
        append(filesystem, path, partial, 1 << 16, progress)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download, "_append", stop_after_the_first_piece)
        with pytest.raises(KeyboardInterrupt):
            fetch(f"{folder}/{NAME}", tmp_path / "part")
    assert (tmp_path / "part" / f".{NAME}.part").read_bytes() == CONTENT[: 1 << 16]
    taken = []

    def recorded(filesystem, path, partial, size, progress):
        taken.append(partial.tell())
        append(filesystem, path, partial, size, progress)

    monkeypatch.setattr(download, "_append", recorded)
    assert fetch(f"{folder}/{NAME}", tmp_path / "part").read_bytes() == CONTENT
    assert taken == [1 << 16]


def test_what_is_not_there_is_one_line(folder: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not found on the server.*check the address") as error:
        fetch(f"{folder}/other.fa.gz", tmp_path)
    assert "\n" not in str(error.value)
