"""`scepsy stop`: end a deployment and everything it started."""

from __future__ import annotations

import argparse

from rich.console import Console

from scepsy.deployment import stop
from scepsy.deployment.on_ray import find_on_ray

HELP = "end a deployment and everything it started"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("name", nargs="?", default="default", help="name of the deployment (default: default)")
    parser.add_argument("--on", choices=("local", "ray"), default="local", help="where it runs (default: local)")
    parser.add_argument("--address", help="with --on ray: the cluster (default: RAY_ADDRESS, or one on this machine)")


def run(args: argparse.Namespace, console: Console) -> int:
    """Stop it."""
    if args.on == "ray":
        find_on_ray(args.name, address=args.address).stop()
    else:
        stop(args.name)
    console.print(f"stopped {args.name!r}")
    return 0
