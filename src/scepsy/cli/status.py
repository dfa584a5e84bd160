"""`scepsy status`: what runs, and how busy it is."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from scepsy.cli.options import add_json
from scepsy_optimizer.errors import ScepsyError

if TYPE_CHECKING:
    from rich.console import Console, Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    from scepsy.deployment import Deployment, Status
    from scepsy.deployment.on_ray import RayDeployment

_WATCH_EVERY_S: Final = 1.0

HELP = "show running deployments and their replicas"

EXAMPLE = """\
  scepsy status --watch
  scepsy status --json | jq '.[].url'"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("name", nargs="?", help="name of the deployment (default: all)")
    parser.add_argument("--on", choices=("local", "ray"), default="local", help="where it runs (default: local)")
    parser.add_argument("--address", help="with --on ray: the cluster (default: RAY_ADDRESS, or one on this machine)")
    add_json(parser)
    parser.add_argument("--watch", action="store_true", help="show it live, until interrupted")


def run(args: argparse.Namespace, console: Console) -> int:
    """Ask each deployment, show it."""
    if args.json:
        found = _found(args, lambda event: print(event, file=sys.stderr))
        states = [{"url": one.url, **asdict(one.status())} for one in found]
        sys.stdout.write(json.dumps(states, indent=2) + "\n")
        return 0

    def tell(event: str) -> None:
        console.print(event, soft_wrap=True, markup=False, highlight=False)

    if not args.watch:
        console.print(_shown(_found(args, tell)))
        return 0
    from rich.live import Live

    # Interrupting is how it is meant to end.
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(_shown(_found(args, tell)), refresh=True)
            time.sleep(_WATCH_EVERY_S)
    return 0


def _found(args: argparse.Namespace, on_event: Callable[[str], None]) -> Sequence[Deployment | RayDeployment]:
    if args.on == "ray":
        from scepsy.deployment.on_ray import find_on_ray

        return [find_on_ray(args.name or "default", address=args.address)]
    from scepsy.deployment import find, list_deployments

    return [find(args.name)] if args.name else list_deployments(on_event)


def _shown(found: Sequence[Deployment | RayDeployment]) -> Group:
    from rich.console import Group
    from rich.text import Text

    if not found:
        return Group("nothing is deployed; start a plan with: scepsy deploy PLAN")
    shown: list[RenderableType] = []
    for deployment in found:
        try:
            status = deployment.status()
        except ScepsyError as error:
            # The others may answer.
            if len(found) == 1:
                raise
            shown.append(Text(str(error)))
        else:
            shown += [_heading(deployment, status), status_table(status), *_troubles(status)]
    return Group(*shown)


def _troubles(status: Status) -> list[Text]:
    """What is wrong with replicas that do not serve: in one line, or for those given up in full."""
    from rich.text import Text

    told = []
    for replica in status.replicas:
        if replica.last_error and replica.phase in ("restarting", "failed"):
            words = replica.last_error if replica.phase == "failed" else replica.last_error.splitlines()[0]
            told.append(Text(f"{replica.id} {replica.phase}: {words}", overflow="fold"))
    return told


def _heading(deployment: Deployment | RayDeployment, status: Status) -> Text:
    from rich.text import Text

    state = "ready" if status.ready else "not ready"
    return Text(
        f"{deployment.name}: {deployment.url}, {status.engine}, {state}, up {status.up_s:.0f} s, "
        f"{status.in_flight} requests in flight",
        style="italic",
    )


def status_table(status: Status) -> Table:
    """One row per replica."""
    from scepsy.report.tables import plain_table

    table = plain_table("")
    for column in ("replica", "LLM", "phase", "place"):
        table.add_column(column)
    for column in ("in flight", "served", "restarts"):
        table.add_column(column, justify="right")
    for replica in status.replicas:
        table.add_row(
            replica.id,
            replica.llm,
            replica.phase,
            replica.place,
            str(replica.outstanding),
            str(replica.served),
            str(replica.restarts),
        )
    return table
