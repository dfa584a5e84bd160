"""`scepsy stop`: end a deployment and everything it started."""

from __future__ import annotations

import argparse

from rich.console import Console

from scepsy.deployment import stop

HELP = "end a deployment and everything it started"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("name", nargs="?", default="default", help="name of the deployment (default: default)")


def run(args: argparse.Namespace, console: Console) -> int:
    """Stop it."""
    stop(args.name)
    console.print(f"stopped {args.name!r}")
    return 0
