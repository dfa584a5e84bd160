"""`scepsy status`: what runs, and how busy it is."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from scepsy.cli.options import add_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from scepsy.deployment import Deployment
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
    from scepsy.deployment import find, list_deployments

    found: list[Deployment | RayDeployment]
    if args.on == "ray":
        from scepsy.deployment.on_ray import find_on_ray

        found = [find_on_ray(args.name or "default", address=args.address)]
    else:
        found = [find(args.name)] if args.name else list(list_deployments())
    if args.json:
        states = [{"url": one.url, **asdict(one.status())} for one in found]
        sys.stdout.write(json.dumps(states, indent=2) + "\n")
        return 0
    if not found:
        console.print("nothing is deployed; start a plan with: scepsy deploy PLAN")
    elif args.watch:
        from rich.console import Group
        from rich.live import Live

        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(Group(*(status_table(one) for one in found)), refresh=True)
                time.sleep(_WATCH_EVERY_S)
    for deployment in found:
        console.print(status_table(deployment))
    return 0


def status_table(deployment: Deployment | RayDeployment) -> Table:
    """One row per replica."""
    from scepsy.report.tables import plain_table

    status = deployment.status()
    state = "ready" if status.ready else "not ready"
    table = plain_table(
        f"{deployment.name}: {deployment.url}, {status.engine}, {state}, up {status.up_s:.0f} s, "
        f"{status.in_flight} requests in flight",
    )
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
