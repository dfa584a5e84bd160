"""`scepsy watch`: follow what a deployment is used for, and propose, or make, a better plan when that has changed."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from scepsy.cli.options import add_json, add_profiles, parse_models
from scepsy_optimizer.errors import ScepsyError

if TYPE_CHECKING:
    from rich.console import Console

    from scepsy.deployment import Deployment
    from scepsy.watching import Seen
    from scepsy_optimizer.requirements import Requirements

HELP = "follow a deployment's traces, and propose a better plan when its use has changed"

EXAMPLE = """\
  scepsy watch                          # after: scepsy deploy plan.yaml --record traces
  scepsy watch --apply --every 60
  scepsy watch --requirements requirements.yaml
  scepsy watch --once || scepsy apply proposed.yaml"""

# The optimizer's BAND and DEAD_BAND, which only a run loads.
_BAND: Final = 0.2
_DEAD_BAND: Final = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("name", nargs="?", default="default", help="name of the deployment (default: default)")
    parser.add_argument(
        "--traces", metavar="DIR", help="where traces are written (default: where the deployment records its calls)"
    )
    add_profiles(parser)
    parser.add_argument(
        "--requirements",
        metavar="FILE",
        help="those of every proposed plan: a plan does not remember what it was made with",
    )
    parser.add_argument("--apply", action="store_true", help="apply what is proposed, without asking")
    parser.add_argument("-o", "--output", default="proposed.yaml", metavar="FILE", help="of the proposed plan")
    parser.add_argument("--window", type=float, default=600.0, metavar="S", help="look at the last S s (default: 600)")
    parser.add_argument("--every", type=float, default=30.0, metavar="S", help="look every S s (default: 30)")
    parser.add_argument(
        "--least", type=int, default=30, metavar="N", help="decide on N executions or more (default: 30)"
    )
    parser.add_argument(
        "--band",
        type=float,
        default=_BAND,
        help=f"how far rate and loads may be off what was planned (default: {_BAND:g})",
    )
    parser.add_argument(
        "--dead-band",
        type=float,
        default=_DEAD_BAND,
        help=f"propose only what saves more than this part of the latency (default: {_DEAD_BAND:g})",
    )
    parser.add_argument("--once", action="store_true", help="look once; exit code 1 where a plan is proposed")
    add_json(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Look, compare, propose; again and again until interrupted, unless told otherwise."""
    for name, value in (("--every", args.every), ("--window", args.window)):
        if not 0 < value < float("inf"):
            raise ScepsyError(f"{name} {value:g}: give a number of seconds above 0")
    for name, value in (("--band", args.band), ("--dead-band", args.dead_band)):
        if not 0 <= value < float("inf"):
            raise ScepsyError(f"{name} {value:g}: give a number that is not negative, such as 0.2 for a fifth")
    if args.least < 1:
        raise ScepsyError(f"--least {args.least}: give a number of executions of at least 1")
    try:
        return _watch(args, console)
    except KeyboardInterrupt:
        return 0


def _watch(args: argparse.Namespace, console: Console) -> int:
    from scepsy.deployment import find
    from scepsy.files import load_requirements
    from scepsy.watching import recent, record_folder
    from scepsy_optimizer.requirements import NO_REQUIREMENTS

    requirements = load_requirements(args.requirements) if args.requirements else NO_REQUIREMENTS
    deployment = find(args.name)
    folder = Path(args.traces) if args.traces else record_folder(deployment.directory)
    changed_s = 0.0
    while True:
        if not deployment.alive:
            raise ScepsyError(f"deployment {args.name!r} has ended; its logs: {deployment.directory}/logs")
        # A new plan is judged by what came after it only.
        window_s = min(args.window, time.time() - changed_s)
        seen = recent(folder, window_s=window_s, now_s=time.time())
        if seen is None or seen.workload.executions < args.least:
            count = 0 if seen is None else seen.workload.executions
            if folder.exists():
                _say(console, f"{count} executions in the last {window_s:.0f} s: waiting for {args.least}")
            else:
                _say(console, f"{folder}: no such folder yet: waiting for it, and for {args.least} executions in it")
            proposed = False
        else:
            try:
                proposed = _look(args, console, deployment, seen, requirements)
            except ScepsyError as error:
                if args.once or not deployment.alive:
                    raise
                # What failed is not tried again at once: first there must be as much to go by as before.
                _say(console, str(error))
                proposed, changed_s = False, time.time()
        if args.json:
            _tell_look(args, seen, proposed=proposed)
        if args.once:
            return int(proposed)
        if proposed and args.apply:
            changed_s = time.time()
        time.sleep(args.every)


def _look(
    args: argparse.Namespace, console: Console, deployment: Deployment, seen: Seen, requirements: Requirements
) -> bool:
    """Whether a plan was proposed, and with --apply made."""
    from scepsy.cli.plan import print_difference
    from scepsy.files import load_plan, save_plan
    from scepsy.inputs import resolve_plan_profiles
    from scepsy_optimizer.adapt import find_drift, propose

    plan = load_plan(deployment.directory / "plan.yaml")
    llms = sorted({part.llm for part in plan.llms} | {demand.llm for demand in seen.workload.demands})
    profiles = resolve_plan_profiles(plan, llms, profiles=args.profiles, models=parse_models(args.model))
    drift = find_drift(plan, seen.workload, profiles, rate_rps=seen.rate_rps, band=args.band)
    count = f"{seen.workload.executions} executions, {seen.rate_rps:.3g}/s"
    if not drift.reasons:
        _say(console, f"{count}: as planned, {drift.latency_s:.3g} s predicted")
        return False
    _say(console, f"{seen.workload.executions} executions: {'; '.join(drift.reasons)}")
    try:
        found = propose(
            plan,
            seen.workload,
            profiles,
            drift,
            dead_band=args.dead_band,
            requirements=requirements,
            replay_seed=0,
        )
    except ScepsyError as error:
        _say(console, f"no better plan: {error}")
        return False
    if found is None:
        _say(console, f"no plan on this cluster saves more than {args.dead_band:.0%} of the latency: nothing to change")
        return False
    save_plan(found.plan, args.output)
    print_difference(plan, found.plan, console)
    if args.apply:
        deployment.apply(found.plan, profiles=profiles, on_event=lambda event: _say(console, event))
        _say(console, f"deployment {deployment.name!r} runs {args.output}")
    else:
        _say(console, f"saves {found.saved:.0%} of the latency; make it so with: scepsy apply {args.output}")
    return True


def _tell_look(args: argparse.Namespace, seen: Seen | None, *, proposed: bool) -> None:
    """For programs: one line for each look."""
    told: dict[str, Any] = {
        "executions": seen.workload.executions if seen else 0,
        "rate_rps": seen.rate_rps if seen else None,
        "proposed": args.output if proposed else None,
        "applied": proposed and args.apply,
    }
    print(json.dumps(told), flush=True)


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, markup=False, highlight=False)
