"""Asks W&B's server directly: whether it answers, and which steps of a run it has."""

import json
from dataclasses import dataclass
from typing import Any

import requests

TIMEOUT = 5.0
"""Seconds within which the server has to answer."""
_VIEWER = "query Viewer { viewer { id entity username } }"
_RUN = """query RunResumeStatus($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) { id name entity { id name }
    bucket(name: $name, missingOk: true) { id name historyLineCount historyTail } } }"""


class ServerTroubleError(Exception):
    """The server fails; the message says how."""


@dataclass(frozen=True)
class Server:
    """W&B's server at `url`, with the user's key."""

    url: str
    key: str

    def entity(self) -> str | None:
        """The user's default entity. Raises `ServerTroubleError` where the server cannot be used with this key."""
        viewer = self._ask(_VIEWER, {}).get("viewer")
        if viewer is None:
            raise ServerTroubleError(
                f"{self.url} does not know the API key; give a new one with `wandb login --relogin`"
            )
        return viewer.get("entity")

    def last_step(self, entity: str | None, project: str, run: str) -> int | None:
        """The newest step in a W&B run's history; 0 for a run without one, None where there is no such run."""
        model = self._ask(_RUN, {"project": project, "entity": entity, "name": run}).get("model")
        bucket = (model or {}).get("bucket")
        if bucket is None:
            return None
        try:
            tail = json.loads(bucket.get("historyTail") or "[]")
            return max((int(json.loads(line).get("_step", 0)) for line in tail), default=0)
        except (ValueError, TypeError, AttributeError):
            raise ServerTroubleError(f"{self.url} returns a history that cannot be read") from None

    def _ask(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        request = {"query": query, "variables": variables}
        try:
            answer = requests.post(f"{self.url}/graphql", json=request, auth=("api", self.key), timeout=TIMEOUT)
        except requests.Timeout:
            raise ServerTroubleError(f"{self.url} does not answer within {TIMEOUT:.0f} s") from None
        except requests.exceptions.SSLError as error:
            raise ServerTroubleError(f"{self.url}: its certificate is not accepted ({_innermost(error)})") from None
        except requests.ConnectionError as error:
            raise ServerTroubleError(f"{self.url} cannot be reached ({_innermost(error)})") from None
        except requests.RequestException as error:
            raise ServerTroubleError(f"{self.url}: {_innermost(error)}") from None
        if answer.status_code in (401, 403):
            raise ServerTroubleError(
                f"{self.url} refuses the API key (status {answer.status_code}); give a new one with `wandb login "
                "--relogin`"
            )
        if answer.status_code != 200:
            raise ServerTroubleError(f"{self.url} answers with status {answer.status_code} ({answer.reason})")
        try:
            return answer.json()["data"] or {}
        except (ValueError, KeyError, TypeError):
            raise ServerTroubleError(
                f"{self.url} gives an answer that is not W&B's; perhaps a proxy intercepts it"
            ) from None


def _innermost(error: BaseException) -> str:
    """The operating system's message about an error, without the wrappers of HTTP libraries."""
    reason = getattr(error, "reason", None) or next(iter(getattr(error, "args", ())), None)
    if isinstance(reason, BaseException) and reason is not error:
        return _innermost(reason)
    text = " ".join(str(error).split())
    return text.rpartition(": ")[2] or type(error).__name__
