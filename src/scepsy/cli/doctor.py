"""`scepsy doctor`: what this machine has of what deploying needs."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from scepsy.cli.options import add_json, parse_command, port

if TYPE_CHECKING:
    from rich.console import Console

HELP = "check what deploying needs: drivers, MPS, vLLM, ports, memory, clock"

EXAMPLE = """\
  scepsy doctor                              # can vLLM be started here?
  scepsy doctor plan.yaml                    # can this plan?
  scepsy doctor plan.yaml --engine vllm-cpu"""

_MARKS: Final = {"ok": "[green]ok     [/]", "missing": "[red]missing[/]", "odd": "[yellow]odd    [/]"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("plan", nargs="?", metavar="PLAN", help="plan file that is to be deployed here")
    parser.add_argument("--engine", choices=("vllm", "vllm-cpu", "emulator"), default="vllm", help="default: vllm")
    parser.add_argument("--command", dest="engine_command", metavar="WORDS", help="how one engine is started")
    parser.add_argument("--port", type=port, default=8000, help="port of the endpoint (default: 8000)")
    add_json(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Look, tell; the exit code is 1 where something that is needed is missing."""
    from scepsy.doctor import examine
    from scepsy.files import load_plan
    from scepsy.report.progress import waiting

    found = waiting("looking", console)(examine)(
        load_plan(args.plan) if args.plan else None,
        engine=args.engine,
        command=parse_command(args.engine_command) or ("vllm", "serve"),
        port=args.port,
    )
    if args.json:
        sys.stdout.write(json.dumps([asdict(one) for one in found], indent=2) + "\n")
    else:
        for one in found:
            console.print(f"{_MARKS[one.state]} {one.name}: ", end="", highlight=False)
            advice = f" -> {one.advice}" if one.advice and one.state != "ok" else ""
            console.print(f"{one.text}{advice}", soft_wrap=True, markup=False, highlight=False)
    return int(any(one.needed and one.state == "missing" for one in found))
