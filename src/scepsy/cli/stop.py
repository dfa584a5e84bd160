"""`scepsy stop`: end a deployment and everything it started."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from scepsy.cli.options import add_json

if TYPE_CHECKING:
    from rich.console import Console

HELP = "end a deployment and everything it started"

EXAMPLE = """\
  scepsy stop
  scepsy stop staging --on ray"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("name", nargs="?", default="default", help="name of the deployment (default: default)")
    parser.add_argument("--on", choices=("local", "ray"), default="local", help="where it runs (default: local)")
    parser.add_argument("--address", help="with --on ray: the cluster (default: RAY_ADDRESS, or one on this machine)")
    add_json(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Stop it."""
    from scepsy.report.progress import waiting

    if args.on == "ray":
        from scepsy.deployment.on_ray import find_on_ray

        waiting("stopping", console)(find_on_ray(args.name, address=args.address).stop)()
    else:
        from scepsy.deployment import stop

        waiting("stopping", console)(stop)(args.name)
    console.print(f"stopped {args.name!r}")
    if args.json:
        print(json.dumps({"stopped": args.name}))
    return 0
