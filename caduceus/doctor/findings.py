"""What the doctor finds, and the page that shows it. Imports no torch."""

import enum
import os
import socket
import textwrap
from dataclasses import dataclass

_WIDTH = 112
_INDENT = " " * 24


class State(enum.IntEnum):
    """How much a finding matters; the page begins with what matters most."""

    WRONG = 0
    LOOK = 1
    OK = 2


@dataclass(frozen=True)
class Finding:
    """One thing that was examined: what it is, what was found, and what to do where that is not well."""

    what: str
    state: State
    told: str
    remedy: str = ""


def ok_unless(problem: bool, what: str, told: str, remedy: str, state: State = State.LOOK) -> Finding:
    """A finding: fine without a problem, otherwise of `state` and with a remedy."""
    return Finding(what, state, told, remedy) if problem else Finding(what, State.OK, told)


def node_name() -> str:
    """This machine's name, as the scheduler calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def page(by_rank: list[tuple[str, list[Finding]]]) -> str:
    """The findings of all ranks, each with its node, as a page of text; the same finding of several nodes is printed
    once.
    """
    nodes = list(dict.fromkeys(node for node, _ in by_rank))
    places: dict[Finding, list[str]] = {}
    for node, findings in by_rank:
        for finding in findings:
            places.setdefault(finding, []).append(node)
    ranks = f"{len(by_rank)} rank{'s' * (len(by_rank) > 1)}"
    lines = [f"{ranks} on {len(nodes)} node{'s' * (len(nodes) > 1)}: {', '.join(nodes)}", ""]
    for finding in sorted(places, key=lambda finding: finding.state):
        where = list(dict.fromkeys(places[finding]))
        told = finding.told if len(where) == len(nodes) else f"{', '.join(where)}: {finding.told}"
        head = f"{finding.state.name.lower():7} {finding.what:15} "
        lines += textwrap.wrap(told, _WIDTH, initial_indent=head, subsequent_indent=_INDENT)
        if finding.remedy:
            lines += textwrap.wrap(f"-> {finding.remedy}", _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT)
    wrong, look = (sum(finding.state is state for finding in places) for state in (State.WRONG, State.LOOK))
    return "\n".join([*lines, "", f"{wrong} wrong, {look} to look at, {len(places) - wrong - look} well"])
