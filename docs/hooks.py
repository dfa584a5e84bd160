"""What MkDocs is to do beyond its configuration: write the command-line reference from the commands themselves."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Iterator
from unittest.mock import patch

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from scepsy.cli import COMMANDS, main

_COLUMNS = "86"
_ACTIONS = re.compile(r"^    ([a-z-]+)  +\S", re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page that no file holds."""
    files.append(File.generated(config, "reference/command_line.md", content=command_line()))
    return files


def command_line() -> str:
    """The help of every command as one page."""
    parts = ["# Command line", "What each command says with `--help`."]
    for words in commands():
        parts += [f"{'##' if len(words) == 1 else '###'} scepsy {' '.join(words)}", f"```text\n{help_of(*words)}```"]
    return "\n\n".join(parts) + "\n"


def commands() -> Iterator[tuple[str, ...]]:
    """Every command, and the actions of those that have some."""
    for name in COMMANDS:
        yield (name,)
        _, _, actions = help_of(name).partition("\n  ACTION\n")
        for action in _ACTIONS.findall(actions.partition("\n\n")[0]):
            yield name, action


def help_of(*words: str) -> str:
    """What `scepsy WORDS --help` prints."""
    shown = io.StringIO()
    wide = patch.dict(os.environ, {"COLUMNS": _COLUMNS, "NO_COLOR": "1"})
    with wide, contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return shown.getvalue()
