"""An http server of a dataset, whose answers a test decides."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """Serves a directory; `asked` lists the paths, `failures` next requests of tars break off half-way.

    `statuses` {end of a path: status} are answers in place of files.
    """

    def __init__(self, directory: Path) -> None:
        self.asked: list[str] = []
        self.failures = 0
        self.statuses: dict[str, int] = {}
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(directory)))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        for end, status in self.server.statuses.items():
            if self.path.endswith(end):
                self.send_error(status)
                return
        if self.server.failures and self.path.endswith(".tar"):
            self.server.failures -= 1
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"half")
            return
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(directory: Path) -> Iterator[Server]:
    """A server that runs in a thread of this process."""
    with Server(directory) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()
