"""python -m caduceus.monitor dashboard --entity E --project P: makes a workspace in W&B with sections for these runs.

The layout is configs/wandb/dashboard.json, which also helps to make a workspace by hand. It needs the package
wandb-workspaces.
"""

import contextlib
import io
import json
from collections.abc import Sequence
from typing import Any

from caduceus.arguments import Parser
from caduceus.errors import UserError
from caduceus.presets import CONFIGS

LAYOUT = CONFIGS / "wandb" / "dashboard.json"


def layout() -> dict[str, Any]:
    """Name and sections of the workspace; each panel has a title, an x axis, and metrics `y` or a `regex` for them."""
    return json.loads(LAYOUT.read_text())


def make_dashboard(entity: str, project: str, name: str | None = None) -> str:
    """Save a new workspace in a project of W&B, and return its address.

    Raises `UserError` where the package is missing, the user is not logged in, or the server refuses.
    """
    try:
        import wandb_workspaces.reports.v2 as panels
        import wandb_workspaces.workspaces as workspaces
    except ImportError as error:
        raise UserError(
            f"dashboard: wandb-workspaces cannot be imported ({error}); install it: pip install 'caduceus[dashboard]'"
        ) from None
    from caduceus.monitor.wandb.account import base_url, key, no_key
    from caduceus.monitor.wandb.server import Server, ServerTroubleError

    wanted = layout()
    sections = [
        workspaces.Section(
            name=section["name"], is_open=True, panels=[_panel(panels, panel) for panel in section["panels"]]
        )
        for section in wanted["sections"]
    ]
    try:
        Server(base_url(), key() or no_key()).entity()  # the library waits long for a failing server
        made = workspaces.Workspace(entity=entity, project=project, name=name or wanted["name"], sections=sections)
        with contextlib.redirect_stderr(io.StringIO()):  # it prints its success there
            return made.save().url
    except (UserError, ServerTroubleError) as error:
        raise UserError(f"dashboard: {error}") from None
    except Exception as error:  # the library and the server raise many kinds
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"dashboard: {entity}/{project}: W&B made no workspace ({told})") from None


def _panel(panels: Any, panel: dict[str, Any]) -> Any:
    metrics = {"y": panel["y"]} if "y" in panel else {"metric_regex": panel["regex"]}
    return panels.LinePlot(title=panel["title"], x=panel["x"], log_y=panel.get("log_y"), **metrics)


def main(arguments: Sequence[str]) -> int:
    """Parse the command line, and make the workspace. Returns the exit status."""
    parser = Parser(prog="python -m caduceus.monitor dashboard", description="Make a workspace of W&B for these runs.")
    parser.add_argument("--entity", required=True, help="user or team of W&B")
    parser.add_argument("--project", required=True, help="project of W&B that has a run")
    parser.add_argument("--name", help="name of the workspace; default: that of the layout")
    options = parser.parse_args(arguments)
    print(make_dashboard(options.entity, options.project, options.name))
    return 0
