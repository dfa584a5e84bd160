"""`scepsy completion`: a script with which a shell completes commands, options and file names."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console

HELP = "print the script with which a shell completes scepsy's commands, options and files"

EXAMPLE = """\
  source <(scepsy completion bash)                                          # in ~/.bashrc
  scepsy completion zsh > "${fpath[1]}/_scepsy"                             # once
  scepsy completion fish > ~/.config/fish/completions/scepsy.fish           # once"""

SHELLS: Final = ("bash", "zsh", "fish")

# What the help of all commands calls a file or folder.
_FILES: Final = ("DIR", "FILE", "FOLDER", "NEW", "OLD", "PATH", "PLAN", "REPORT", "TRACES")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("shell", choices=SHELLS, help="which shell")


def run(args: argparse.Namespace, _console: Console) -> int:
    """Print the script."""
    import shtab

    from scepsy.cli import make_parser

    parser = make_parser()
    _mark_files(parser, shtab.FILE)
    print(shtab.complete(parser, args.shell))
    return 0


def _mark_files(parser: argparse.ArgumentParser, files: Any) -> None:
    """Say of all arguments that are files that they are."""
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to its arguments, nor has shtab
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001 - the same
            for inner in action.choices.values():
                _mark_files(inner, files)
        elif action.metavar in _FILES:
            vars(action)["complete"] = files  # what shtab looks for
