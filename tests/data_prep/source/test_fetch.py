"""Downloads against a real server on this computer: resume, change of the file, checksums, and failures in one line."""

import contextlib
import hashlib
import http.server
import multiprocessing
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from caduceus.errors import UserError
from data_prep import fetch_genome
from data_prep.source import download
from data_prep.source.download import fetch
from data_prep.source.registry import GenomeSpec

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
NAME = "genome.fa.gz"


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` under any path but /missing; counts what it sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag = CONTENT, '"one"'
        self.ranges = True
        self.cut_after: list[int] = []  # the next answers break off after so many bytes
        self.sent = 0
        self.starts: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/folder/{NAME}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the client may hang up, as this server does
            super().handle()

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        server = self.server
        if "missing" in self.path:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, stop = 0, len(server.content)
        wanted = self.headers.get("Range") if server.ranges else None
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            start, stop = int(first), min(int(last) + 1 if last else stop, stop)
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{len(server.content)}")
        if server.ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", server.etag)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if not with_body:
            return
        server.starts.append(start)
        body = server.content[start:stop]
        if server.cut_after:
            body = body[: server.cut_after.pop(0)]
            self.close_connection = True
        self.wfile.write(body)
        self.wfile.flush()
        server.sent += len(body)
        if self.close_connection:
            time.sleep(0.05)  # or the client may not have taken what came before the end
            self.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(download, "CHUNK", 1 << 16)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_downloads_once(server, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    path = fetch(server.url, tmp_path / "new", sha256=digest)
    assert path == tmp_path / "new" / NAME
    assert path.read_bytes() == CONTENT
    assert names(path.parent) == [NAME]
    sent = server.sent
    assert fetch(server.url, tmp_path / "new", sha256=digest) == path
    assert server.sent == sent
    assert names(path.parent) == [NAME]


def test_survives_cut_connections(server, tmp_path):
    server.cut_after = [10_000, 0, 5]
    assert fetch(server.url, tmp_path).read_bytes() == CONTENT


def test_resumes_where_an_earlier_run_stopped(server, tmp_path):
    server.cut_after = [150_000] + [0] * download.ATTEMPTS
    with pytest.raises(UserError, match="run the command again to continue"):
        fetch(server.url, tmp_path)
    have = (tmp_path / f".{NAME}.part").read_bytes()
    assert 0 < len(have) <= 150_000
    assert CONTENT.startswith(have)
    assert not (tmp_path / NAME).exists()
    server.cut_after, server.sent, server.starts = [], 0, []
    assert fetch(server.url, tmp_path, md5=hashlib.md5(CONTENT).hexdigest()).read_bytes() == CONTENT
    assert min(server.starts) == len(have)
    assert server.sent == len(CONTENT) - len(have)
    assert names(tmp_path) == [NAME]


def test_starts_anew_when_the_file_has_changed(server, tmp_path):
    server.cut_after = [150_000] + [0] * download.ATTEMPTS
    with pytest.raises(UserError):
        fetch(server.url, tmp_path)
    assert (tmp_path / f".{NAME}.part").stat().st_size > 0
    server.cut_after = []
    server.content, server.etag = CONTENT[::-1], '"two"'
    assert fetch(server.url, tmp_path).read_bytes() == CONTENT[::-1]


def test_server_without_ranges(server, tmp_path):
    server.ranges = False
    server.cut_after = [150_000]
    assert fetch(server.url, tmp_path).read_bytes() == CONTENT
    server.cut_after = [150_000] * 100  # never gets through, and must not try without end
    with pytest.raises(UserError, match="run the command again"):
        fetch(server.url.replace(NAME, "other.fa"), tmp_path)


def test_checksum_mismatch_keeps_nothing(server, tmp_path):
    with pytest.raises(UserError, match=rf"{NAME}: sha256 is [0-9a-f]{{64}}, expected 00"):
        fetch(server.url, tmp_path, sha256="00" * 32)
    assert names(tmp_path) == []
    assert fetch(server.url, tmp_path).read_bytes() == CONTENT
    with pytest.raises(UserError, match=r"md5 is .* delete it and run the command again"):
        fetch(server.url, tmp_path, md5="00" * 16)
    assert (tmp_path / NAME).exists()


def test_missing_file(server, tmp_path):
    with pytest.raises(UserError, match=r"http://.*/missing.fa: not found on the server \(404\)"):
        fetch(server.url.replace(NAME, "missing.fa"), tmp_path)
    assert names(tmp_path) == []


def test_refused_connection(tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(UserError, match=r"cannot be downloaded \(.*connect") as caught:
        fetch(f"http://127.0.0.1:{port}/x.fa", tmp_path)
    assert "\n" not in str(caught.value)


def test_unknown_scheme_and_missing_package(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown kind of address 'gopher'"):
        fetch("gopher://host/x.fa", tmp_path)
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as if it were not installed, nor found before
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(UserError, match="pip install s3fs"):
        fetch("s3://bucket/x.fa", tmp_path)


def test_url_without_a_file_name(tmp_path):
    with pytest.raises(UserError, match="names no file"):
        fetch("http://127.0.0.1:9/", tmp_path)


def test_local_file(tmp_path):
    path = tmp_path / "my genome.fa"
    path.write_bytes(CONTENT)
    assert fetch(str(path), tmp_path / "out") == path
    assert fetch(path.as_uri(), tmp_path / "out", md5=hashlib.md5(CONTENT).hexdigest()) == path
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="md5 is"):
        fetch(str(path), tmp_path, md5="00" * 16)
    assert path.exists()
    with pytest.raises(UserError, match="no such file"):
        fetch(str(tmp_path / "none.fa"), tmp_path)


def test_next_address_is_tried(server, tmp_path, capfd):
    genome = GenomeSpec("x", urls=(server.url.replace(NAME, "missing.fa"), server.url))
    assert download.fetch_genome(genome, tmp_path).read_bytes() == CONTENT
    assert "not found on the server (404)" in capfd.readouterr().err


@pytest.mark.slow
def test_two_processes_at_once(server, tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=fetch, args=(server.url, tmp_path)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert server.sent == len(CONTENT)
    assert names(tmp_path) == [NAME]


def test_unwritable_folder(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match="cannot be written"):
        fetch(server.url, tmp_path / "file" / "sub")


@pytest.mark.moderate
def test_command_line(server, tmp_path):
    command = [sys.executable, fetch_genome.__file__]
    done = subprocess.run([*command, server.url, "--out", tmp_path], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).read_bytes() == CONTENT
    failed = subprocess.run([*command, "hg99", "--out", tmp_path], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: 'hg99' is not a genome of the registry; known are ce11, dm6")
    assert failed.stderr.count("\n") == 1
