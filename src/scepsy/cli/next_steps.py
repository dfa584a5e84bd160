"""`scepsy` alone: what to do next, by what is in this directory and what runs."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from scepsy import __version__
from scepsy.deployment.home import deployments_folder

_TRACES: Final = "scepsy-traces"
_SUFFIXES: Final = (".yaml", ".yml", ".json")
_PLAN: Final = b"scepsy-plan/"
_FIRST_BYTES: Final = 200


def describe_next_steps() -> list[str]:
    """Lines: what was found, the next commands with a word on each, where the rest is told."""
    running, plan, traces = _running(), _newest_plan(Path()), _traces()
    found = [
        *([f"{', '.join(running)} running"] if running else []),
        *([f"plan {plan}"] if plan else []),
        *([f"traces in {traces}"] if traces else []),
    ]
    lines = [f"scepsy {__version__}: serve agentic workflows on your own GPUs: trace, plan, deploy", ""]
    lines.append(f"Found: {'; '.join(found)}." if found else "Found here: no traces, no plan; nothing is deployed.")
    steps = list(_next(running, plan, traces))
    width = max(len(command) for command, _ in steps)
    lines += ["Next:", *(f"  {command:<{width}}  {word}" for command, word in steps)]
    return [*lines, "", "All commands: scepsy --help"]


def _next(running: list[str], plan: str | None, traces: str | None) -> Iterator[tuple[str, str]]:
    if running:
        name = "" if running == ["default"] else f" {running[0]}"
        yield f"scepsy status{name} --watch", "how busy it is"
        yield f"scepsy watch{name}", "a better plan when its use changes"
        if plan:
            yield (
                f"scepsy apply {shlex.quote(plan)}{f' --name{name}' if name else ''} --dry-run",
                "what that would change",
            )
        yield f"scepsy stop{name}", "end it"
    elif plan:
        yield f"scepsy plan show {shlex.quote(plan)}", "look at it"
        yield f"scepsy doctor {shlex.quote(plan)}", "can it be deployed here?"
        yield f"scepsy deploy {shlex.quote(plan)}", "start its engines behind one endpoint"
    elif traces:
        where = shlex.quote(traces)
        yield f"scepsy report {where}", "what the workflows ask of each LLM"
        yield f"scepsy optimize {where} --cluster auto --rate 1", "a plan (or --cluster 8xH100)"
    else:
        yield "scepsy demo", "all of it on emulated GPUs, in three minutes"
        yield "scepsy collect --upstream http://localhost:8000", "trace agents in front of that server"
        yield "scepsy.instrument()", "in an agent's program: trace it"


def _running() -> list[str]:
    """Names of the deployments on this machine; what looks them up is loaded only if there may be any."""
    if not any(deployments_folder().glob("*/state.json")):
        return []
    from scepsy.deployment import list_deployments

    return [one.name for one in list_deployments()]


def _newest_plan(folder: Path) -> str | None:
    plans = [path for path in folder.iterdir() if path.suffix in _SUFFIXES and _is_plan(path)]
    return max(plans, key=lambda path: path.stat().st_mtime).name if plans else None


def _is_plan(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _PLAN in file.read(_FIRST_BYTES)
    except OSError:
        return False


def _traces() -> str | None:
    """Where capture writes, if it has written there."""
    folder = Path(os.environ.get("SCEPSY_TRACES") or _TRACES)
    return str(folder) if folder.is_dir() and any(folder.iterdir()) else None
