"""HTTP of the stand-in for W&B's server: what a request asks of it, and each way to fail."""

import json
import re
import socket
import struct
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

OF_ENTITY: dict[Any, tuple[int, dict[str, Any]]] = {
    "forbidden": (403, {"errors": [{"message": "permission denied"}]}),
    "no entity": (404, {"errors": [{"message": "entity laboratory not found during upsertBucket"}]}),
}


class Server(ThreadingHTTPServer):
    allow_reuse_address = True
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed hang up in the midst of things."""


class Handler(BaseHTTPRequestHandler):
    server_state: Any
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._respond(200, {})

    def do_PUT(self) -> None:
        self._store()

    def do_POST(self) -> None:
        body = self._read()
        if len(body) > self.server_state.most_bytes:
            self._respond(413, {"errors": [{"message": "request entity too large"}]})
            return
        state, path = self.server_state, urlsplit(self.path).path
        stream = re.fullmatch(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream", path)
        if self._failed(stream is not None):
            return
        if self.headers.get("Authorization") is None:
            self._respond(401, {"errors": [{"message": "user is not logged in"}]})
        elif stream:
            self._stream(state.key({"entity": stream.group(1)}, stream.group(3)), json.loads(body))
        else:
            request = json.loads(body)
            name = (request.get("variables") or {}).get("name")
            if state.fault in OF_ENTITY and name is not None:
                self._respond(*OF_ENTITY[state.fault])
                return
            if "upsertBucket" in request["query"] and name in state.deleted:
                message = f"run {name} was previously created and deleted; try a new run name"
                self._respond(409, {"errors": [{"message": message}]})
                return
            try:
                self._respond(200, {"data": state.answer(request["query"], request.get("variables") or {})})
            except ValueError as error:
                self._respond(200, {"errors": [{"message": str(error)}], "data": None})

    def _stream(self, name: str, chunk: dict[str, Any]) -> None:
        state = self.server_state
        with state._lock:
            state.requests.append("file_stream")
            run = state.runs[name]
            for file, part in (chunk.get("files") or {}).items():
                if file == "wandb-summary.json":
                    run.summary = part["content"][-1]
                else:
                    run.take(file, part["offset"], part["content"])
            run.preempting = run.preempting or bool(chunk.get("preempting"))
            if chunk.get("complete"):
                run.exit_code = chunk.get("exitcode")
        self._respond(200, {"exitcode": None, "limits": {}})

    def _store(self) -> None:
        body = self._read()
        if self._failed(False):
            return
        _, kind, owner, name = unquote(urlsplit(self.path).path).split("/", 3)
        state = self.server_state
        with state._lock:
            files = state.artifact_files.setdefault(owner, {}) if kind == "artifacts" else state.runs[owner].files
            files[name] = body
        self._respond(200, {})

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _failed(self, stream: bool) -> bool:
        """Fail as the server's fault says; whether it did."""
        state = self.server_state
        fault = state.fault
        if fault == "hang":
            time.sleep(state.hang_seconds)
        if fault in ("hang", "drop"):
            self.close_connection = True
        elif fault == "reset":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif fault == "garbage":
            self._write(200, b"<html>a proxy's page of log-in</html>")
        elif fault == "busy":
            self._respond(429, {"errors": [{"message": "rate limit exceeded"}]})
        elif isinstance(fault, int) or (fault == "stream" and stream):
            status = fault if isinstance(fault, int) else 500
            self._respond(status, {"errors": [{"message": f"failing with {status}"}]})
        else:
            return False
        return True

    def _respond(self, status: int, answer: dict[str, Any]) -> None:
        self._write(status, json.dumps(answer).encode())

    def _write(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
