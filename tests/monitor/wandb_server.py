"""A local stand-in of W&B's server: as much of its protocol as the real client needs to start, log, resume and finish.

GraphQL at /graphql, the file stream at /files/ENTITY/PROJECT/RUN/file_stream, uploads of files at /storage/. It fails
as `fault` says, and counts requests.
"""

import json
import re
import threading
from dataclasses import dataclass, field
from typing import Any

from tests.monitor.wandb_artifacts import Artifacts
from tests.monitor.wandb_http import Handler, Server

ENTITY, KEY = "laboratory", "k" * 40


@dataclass
class ServerRun:
    """What the server keeps of one run."""

    name: str
    project: str
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    """{file: {offset: line}} of the file stream."""
    written_twice: int = 0
    """Lines of the history, the system's metrics or the console at an offset that had one already."""
    config: dict[str, Any] = field(default_factory=dict)
    summary: str = "{}"
    properties: dict[str, Any] = field(default_factory=dict)
    """The variables of the upserts, but for the empty ones."""
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    preempting: bool = False
    rewinds: int = 0

    @property
    def history(self) -> list[dict[str, Any]]:
        """The rows of the history, in the order of the server's offsets."""
        stored = self.lines.get("wandb-history.jsonl", {})
        return [json.loads(stored[offset]) for offset in sorted(stored)]

    def take(self, file: str, offset: int, content: list[str]) -> None:
        stored = self.lines.setdefault(file, {})
        for number, line in enumerate(content, start=offset):
            self.written_twice += number in stored
            stored[number] = line

    def count(self, file: str) -> int:
        return len(self.lines.get(file, {}))

    def tail(self, file: str) -> str:
        stored = self.lines.get(file, {})
        return json.dumps([stored[max(stored)]] if stored else [])


class WandbServer(Artifacts):
    """Serves while used as a context manager; `url` is WANDB_BASE_URL.

    `fault`: None, or how it fails: a status such as 401 or 500, "hang" (answers after `hang_seconds`), "refuse" (the
    port is closed), "drop" (closes connections without an answer), "reset" (resets them in the midst of an answer),
    "garbage" (an answer that is no JSON), "busy" (429), "forbidden" and "no entity" (403 and 404 of everything that is
    about a run, as of another's entity), "stream" (500 of the file stream alone). Requests of more than `most_bytes`
    are refused with 413.
    """

    def __init__(self, can_rewind: bool = False) -> None:
        self.runs: dict[str, ServerRun] = {}
        self.fault: str | int | None = None
        self.deleted: set[str] = set()
        self.hang_seconds = 60.0
        self.most_bytes = 1 << 30
        self.can_rewind = can_rewind
        self.requests: list[str] = []
        super().__init__()
        self.alerts: list[tuple[str, str, str]] = []
        """Title, text and level."""
        self.views: list[dict[str, Any]] = []
        """The variables of the workspaces that were saved."""
        self.unknown: list[str] = []
        self._server: Server | None = None
        self._lock = threading.Lock()
        self._port = 0
        self._open()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> "WandbServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Refuse connections from now on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def reopen(self) -> None:
        if self._server is None:
            self._open()

    def fail(self, fault: str | int | None) -> None:
        """Fail in this way from now on."""
        self.fault = fault
        self.close() if fault == "refuse" else self.reopen()

    def only_run(self) -> ServerRun:
        (run,) = self.runs.values()
        return run

    def _open(self) -> None:
        handler = type("Handler", (Handler,), {"server_state": self})
        self._server = Server(("127.0.0.1", self._port), handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The `data` of a GraphQL request."""
        name = (re.search(r"(?:query|mutation)\s+(\w+)", query) or re.search(r"()", query)).group(1)
        operation = getattr(self, f"_{name}", None)
        with self._lock:
            self.requests.append(name)
            if operation is not None:
                return operation(variables)
            if "viewer" in query:
                return self._Viewer(variables)
            self.unknown.append(query)
            return {}

    def key(self, variables: dict[str, Any], name: str) -> str:
        """A run's in `runs`: its name, and in front of it an entity that is not the user's own."""
        entity = variables.get("entity") or ENTITY
        return name if entity == ENTITY else f"{entity}:{name}"

    def _Viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        viewer = {"id": "1", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": viewer}

    def _ServerFeaturesQuery(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _OrganizationCoreWeaveOrganizationID(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(self.key(variables, variables["name"]))
        entity = variables.get("entity") or ENTITY
        bucket = None if run is None else self._bucket(run)
        project = variables.get("project")
        return {"model": {"id": "1", "name": project, "entity": {"id": "1", "name": entity}, "bucket": bucket}}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        key = self.key(variables, name)
        inserted = key not in self.runs
        run = self.runs.setdefault(key, ServerRun(name, variables.get("project") or "uncategorized"))
        run.properties.update({key: value for key, value in variables.items() if value is not None})
        if variables.get("config"):
            run.config = json.loads(variables["config"])
        return {"upsertBucket": {"bucket": self._bucket(run), "inserted": inserted}}

    def _RewindRun(self, variables: dict[str, Any]) -> dict[str, Any]:
        if not self.can_rewind:
            raise ValueError("rewinding runs is not enabled")
        run = self.runs[variables["runName"]]
        kept = [line for line in run.history if line["_step"] <= variables["metricValue"]]
        run.lines["wandb-history.jsonl"] = {number: json.dumps(line) for number, line in enumerate(kept)}
        run.rewinds += 1
        return {"rewindRun": {"rewoundRun": self._bucket(run)}}

    def _NotifyScriptableRunAlert(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.alerts.append((variables["title"], variables["text"], variables["severity"]))
        return {"notifyScriptableRunAlert": {"success": True}}

    def _UpsertView2(self, variables: dict[str, Any]) -> dict[str, Any]:
        if variables["entityName"] != ENTITY:
            raise ValueError("permission denied")
        self.views.append(variables)
        return {"upsertView": {"view": {"id": "Vmlldzox", "name": variables["name"]}, "inserted": True}}

    def _CreateRunFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        key = self.key(variables, variables["run"])
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/{key}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}

    def _MarkRunFilesUploaded(self, variables: dict[str, Any]) -> dict[str, Any]:
        return {"markRunFilesUploaded": {"success": True}}

    def _bucket(self, run: ServerRun) -> dict[str, Any]:
        entity = run.properties.get("entity") or ENTITY
        project = {"id": "1", "name": run.project, "entity": {"id": "1", "name": entity}}
        counts = {"historyLineCount": run.count("wandb-history.jsonl"), "logLineCount": run.count("output.log")}
        return {
            "id": run.name,
            "name": run.name,
            "displayName": run.properties.get("displayName") or run.name,
            "description": "",
            "sweepName": None,
            "project": project,
            "config": json.dumps(run.config),
            "summaryMetrics": run.summary,
            **counts,
            "eventsLineCount": run.count("wandb-events.jsonl"),
            "historyTail": run.tail("wandb-history.jsonl"),
            "eventsTail": run.tail("wandb-events.jsonl"),
            "tags": run.properties.get("tags") or [],
            "notes": run.properties.get("notes"),
            "wandbConfig": json.dumps({"t": 1}),
        }
