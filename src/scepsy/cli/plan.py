"""`scepsy plan`: show a plan file, what would change from one to another, or a plan in the format of another tool."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from scepsy.cli.options import add_json
from scepsy.deployment.export_formats import DESCRIPTIONS

if TYPE_CHECKING:
    from rich.console import Console

    from scepsy_optimizer.moves import Moves
    from scepsy_optimizer.plan import Plan

HELP = "show a plan, what would change from one to another, or export it for other tools"

EXAMPLE = """\
  scepsy plan show plan.yaml --html plan.html
  scepsy plan diff running.yaml plan.yaml
  scepsy plan export plan.yaml --to litellm --name default"""


SHOW = """\
examples:
  scepsy plan show plan.yaml
  scepsy plan show plan.yaml --html plan.html"""
DIFF = """\
example:
  scepsy plan diff running.yaml plan.yaml"""
EXPORT = """\
examples:
  scepsy plan export plan.yaml --to litellm --name default > litellm.yaml
  scepsy plan export plan.yaml --to production-stack > values.yaml"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    raw = argparse.RawDescriptionHelpFormatter
    show = actions.add_parser(
        "show", help="a plan as a table, with what is wrong with its placement", epilog=SHOW, formatter_class=raw
    )
    show.add_argument("plan", metavar="PLAN", help="plan file, as scepsy optimize writes it")
    show.add_argument("--html", metavar="FILE", help="write a self-contained page as well")
    add_json(show)
    diff = actions.add_parser(
        "diff",
        help="which replicas stay, start and stop from a running plan to a new one",
        epilog=DIFF,
        formatter_class=raw,
    )
    diff.add_argument("old", metavar="OLD", help="plan file of what runs")
    diff.add_argument("new", metavar="NEW", help="plan file of what is to run")
    add_json(diff)
    told = "\n".join(f"{name}: {text}" for name, text in DESCRIPTIONS.items())
    other = actions.add_parser(
        "export", help="a plan as configuration of something else", description=told, epilog=EXPORT, formatter_class=raw
    )
    other.add_argument("plan", metavar="PLAN", help="plan file")
    other.add_argument("--to", choices=list(DESCRIPTIONS), required=True, help="whose configuration")
    other.add_argument("--name", help="the running deployment whose replicas' addresses are meant")
    other.add_argument("--url", action="append", default=[], metavar="URL", help="address of each replica, in order")


def run(args: argparse.Namespace, console: Console) -> int:
    """Print; the exit code of `show` is 1 where the plan cannot be placed as it says."""
    from scepsy.files import load_plan

    if args.action == "show":
        return _show(load_plan(args.plan), args, console)
    if args.action == "export":
        from scepsy.deployment.exports import export

        sys.stdout.write(export(load_plan(args.plan), args.to, args.url or _addresses(args.name)))
        return 0
    old, new = load_plan(args.old), load_plan(args.new)
    if args.json:
        print(json.dumps(describe_difference(old, new)))
    else:
        print_difference(old, new, console)
    return 0


def describe_difference(old: Plan, new: Plan) -> dict[str, Any]:
    """For programs: the steps from one plan to another in their order, and how many replicas stay."""
    from scepsy_optimizer.moves import plan_moves

    moves = plan_moves(old, new)
    return {
        "stay": len(moves.stay),
        "start": moves.restarts,
        "interrupted": list(moves.interrupted),
        "steps": [
            {
                "action": step.action,
                "llm": step.engine.llm,
                "tensor_parallel_size": step.engine.tensor_parallel_size,
                "fraction": float(step.engine.fraction),
                "node": step.slot.node,
                "devices": list(step.slot.devices),
                "interrupts": step.interrupts,
                "temporary": step.temporary,
            }
            for step in moves.steps
        ],
    }


def print_difference(old: Plan, new: Plan, console: Console) -> None:
    """Every step from one plan to another, how many that are, and what is predicted to come of it."""
    from scepsy_optimizer.moves import describe_moves, plan_moves

    moves = plan_moves(old, new)
    for line in (*describe_moves(moves), *describe_totals(moves), *describe_change(old, new)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def _addresses(name: str | None) -> list[str]:
    """Where the replicas of a running deployment answer, in the order of its plan."""
    if name is None:
        return []
    from scepsy.deployment import find

    return [replica.url for replica in find(name).status().replicas]


def _show(plan: Plan, args: argparse.Namespace, console: Console) -> int:
    from scepsy.report.plan_page import write_plan_page
    from scepsy.report.sentences import describe_plan
    from scepsy.report.tables import plan_table
    from scepsy_optimizer.placement import check_placement

    wrong = check_placement(plan)
    if args.html:
        write_plan_page(plan, args.html, name=args.plan)
    if args.json:
        from pydantic import TypeAdapter

        from scepsy_optimizer.plan import Plan

        # Written by pydantic first: a latency beyond saturation is infinite, for which JSON has null alone.
        shown = json.loads(TypeAdapter(Plan).dump_json(plan))
        print(json.dumps({"plan": shown, "wrong": wrong}, allow_nan=False))
        return 1 if wrong else 0
    console.print(plan_table(plan))
    for part in plan.llms:
        places = "; ".join(f"{slot.node}: {','.join(map(str, slot.devices))}" for slot in part.slots)
        whole = f"tensor_parallel_size {part.tensor_parallel_size}"
        size = f"{part.fraction:g} of a device" if part.fraction < 1 else whole
        console.print(f"{part.llm} ({size}) on {places}", soft_wrap=True, markup=False, highlight=False)
    for line in describe_plan(plan):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    if args.html:
        console.print(f"written to {args.html}", soft_wrap=True, markup=False, highlight=False)
    for line in wrong:
        console.print(f"wrong: {line}", soft_wrap=True, markup=False, highlight=False)
    return 1 if wrong else 0


def describe_totals(moves: Moves) -> list[str]:
    """How many replicas stay and restart, and who is interrupted."""
    if not moves.steps:
        return [f"nothing changes: {len(moves.stay)} replicas stay"]
    stops = sum(step.action == "stop" for step in moves.steps)
    lines = [f"{len(moves.stay)} replicas stay, {moves.restarts} start, {stops} stop"]
    if moves.interrupted:
        lines.append(
            f"without any replica for a while: {', '.join(moves.interrupted)}; no order was found that avoids it"
        )
    return lines


def describe_change(old: Plan, new: Plan) -> list[str]:
    """What the new plan is predicted to give beside the old one, where both say so."""
    if old.prediction is None or new.prediction is None:
        return []
    before, after = old.prediction, new.prediction
    return [
        f"rate {old.rate_rps:g} -> {new.rate_rps:g} executions/s, mean latency {before.latency_s:.3g} -> "
        f"{after.latency_s:.3g} s, highest rate {before.max_rate_rps:.3g} -> {after.max_rate_rps:.3g}/s, devices "
        f"{sum(part.device_count for part in old.llms):g} -> {sum(part.device_count for part in new.llms):g}"
    ]
