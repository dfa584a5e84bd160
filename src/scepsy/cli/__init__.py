"""The command line: one module per command, one clear line per error.

A command's module imports only what its arguments need at its top, and the rest where it runs: help, completion and
short commands are there at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final, NoReturn

from scepsy import __version__
from scepsy_optimizer.errors import ScepsyError

# Each module has HELP, EXAMPLE, add_arguments(parser) and run(args, console) -> exit code.
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
    "completion",
)

# Modules that come with an extra, for those that are missed without a word of their own.
_EXTRAS: Final = {
    **dict.fromkeys(("aiohttp", "httptools", "orjson", "prometheus_client", "psutil", "pynvml", "uvloop"), "deploy"),
    "aiconfigurator_core": "estimate",
    "kubernetes": "kubernetes",
    "ray": "ray",
}


class Parser(argparse.ArgumentParser):
    """Errors in one line that names the way out."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the words that were given, and end with 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="scepsy",
        description="Serve agentic workflows on your own GPUs: trace, plan, deploy.",
        epilog="without a command: what to do next, by what is in this directory",
    )
    parser.add_argument("--version", action="version", version=f"scepsy {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f"scepsy.cli.{name}")
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=f"examples:\n{module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 unusable input, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words and not words[0].startswith("-") else None
    shown = f"scepsy {command}" if command else "scepsy"
    try:
        if command is not None and command not in COMMANDS:
            return _refuse(command)
        code = _run(words)
        if sys.stdout is not None:  # a process may be started without one
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has had enough, as `head` does. The interpreter flushes once more at its end, into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ScepsyError as error:
        print(f"{shown}: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = _EXTRAS.get(package)
        if extra is None:
            raise
        print(f"{shown}: {package} is not installed: pip install 'scepsy[{extra}]'", file=sys.stderr)
        return 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"{shown}: {place}{error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{shown}: interrupted", file=sys.stderr)
        return 130
    return code


def _run(words: Sequence[str]) -> int:
    if not words:
        from scepsy.cli.next_steps import describe_next_steps

        print("\n".join(describe_next_steps()))
        return 0
    parser = make_parser()
    args = parser.parse_args(words)
    if args.command is None:
        parser.error("name a command")

    from scepsy.report.console import CommandConsole

    # Where a program reads the output, what is told to people goes beside it.
    return int(args.run(args, CommandConsole(stderr=getattr(args, "json", None) is True)))


def _refuse(command: str) -> int:
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    advice = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)};"
    print(f"scepsy: no command {command!r}: {advice} See scepsy --help", file=sys.stderr)
    return 2
