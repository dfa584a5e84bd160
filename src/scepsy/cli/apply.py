"""`scepsy apply`: change a running deployment to another plan."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from scepsy.cli.options import add_json, add_profiles, parse_models

if TYPE_CHECKING:
    from rich.console import Console

HELP = "change a running deployment to another plan, restarting only what differs"

EXAMPLE = """\
  scepsy apply other.yaml --dry-run         # what would start and stop, in which order
  scepsy apply other.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("plan", metavar="PLAN", help="plan file of what is to run")
    parser.add_argument("--name", default="default", help="name of the deployment (default: default)")
    parser.add_argument("--dry-run", action="store_true", help="only say what would change")
    parser.add_argument(
        "--drain", type=float, default=600.0, metavar="S", help="how long a replica may end its answers (default: 600)"
    )
    add_profiles(parser)
    add_json(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Compare, change, say when it is done."""
    from scepsy.cli.plan import describe_difference, print_difference
    from scepsy.deployment import find
    from scepsy.deployment.state import read_order
    from scepsy.files import load_plan
    from scepsy.inputs import resolve_plan_profiles
    from scepsy.report.progress import waiting
    from scepsy_optimizer.placement import require_placed

    plan = load_plan(args.plan)
    require_placed(plan)
    deployment = find(args.name)
    running = load_plan(deployment.directory / "plan.yaml")
    if args.dry_run:
        if args.json:
            print(json.dumps(describe_difference(running, plan)))
        else:
            print_difference(running, plan, console)
        return 0
    profiles = None
    order = read_order(deployment.directory)
    if order.engine == "emulator" or order.kv_cache_bytes:
        profiles = resolve_plan_profiles(plan, profiles=args.profiles, models=parse_models(args.model))
    waiting("changing", console)(deployment.apply)(
        plan,
        profiles=profiles,
        drain_s=args.drain,
        on_event=lambda event: console.print(event, soft_wrap=True, markup=False, highlight=False),
    )
    console.print(f"deployment {args.name!r} runs {args.plan}", soft_wrap=True, markup=False, highlight=False)
    if args.json:
        print(json.dumps({"name": args.name, "url": deployment.url, **describe_difference(running, plan)}))
    return 0
