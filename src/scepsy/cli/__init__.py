"""The command line: one module per command, one clear line per error."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from rich.console import Console

from scepsy_optimizer.errors import ScepsyError

# Each module has HELP, add_arguments(parser) and run(args, console) -> exit code; it is imported when it is asked for,
# or for the help of all.
COMMANDS = (
    "demo",
    "collect",
    "report",
    "profile",
    "optimize",
    "replay",
    "plan",
    "deploy",
    "apply",
    "watch",
    "status",
    "stop",
    "doctor",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 unusable input, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="scepsy", description="Serve agentic workflows on your own GPUs: trace, plan, deploy."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"scepsy.cli.{name}")
        command = commands.add_parser(name, help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    args = parser.parse_args(argv)
    console = Console()
    try:
        code = int(args.run(args, console))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has had enough, as `head` does. The interpreter flushes once more at its end, into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ScepsyError as error:
        print(f"scepsy {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"scepsy {args.command}: interrupted", file=sys.stderr)
        return 130
    return code
