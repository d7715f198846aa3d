"""An S3 server on this computer, for s3fs to talk to."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest


@contextmanager
def s3_bucket(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes | Path]) -> Iterator[str]:
    """The URL of a bucket that holds `files` by their keys; this process's environment points s3fs at it."""
    boto3 = pytest.importorskip("boto3")
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        settings = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret"}
        for name, value in (settings | {"DEFAULT_REGION": "us-east-1"}).items():
            monkeypatch.setenv(f"AWS_{name}", value)
        # What earlier tests of this process left: a client with other settings, and their buckets.
        s3fs.S3FileSystem.clear_instance_cache()
        urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
        client = boto3.client("s3")
        client.create_bucket(Bucket="genomes")
        for key, content in files.items():
            body = content.read_bytes() if isinstance(content, Path) else content
            client.put_object(Bucket="genomes", Key=key, Body=body)
        yield "s3://genomes"
    finally:
        server.stop()
