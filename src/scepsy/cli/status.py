"""`scepsy status`: what runs, and how busy it is."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from scepsy.deployment import Deployment, find, list_deployments
from scepsy.report.tables import plain_table

HELP = "show running deployments and their replicas"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("name", nargs="?", help="name of the deployment (default: all)")


def run(args: argparse.Namespace, console: Console) -> int:
    """Ask each deployment, show it."""
    found = [find(args.name)] if args.name else list(list_deployments())
    if not found:
        console.print("nothing is deployed; start a plan with: scepsy deploy PLAN")
    for deployment in found:
        console.print(status_table(deployment))
    return 0


def status_table(deployment: Deployment) -> Table:
    """One row per replica."""
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
