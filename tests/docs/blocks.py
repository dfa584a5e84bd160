"""The code blocks of a page, and how each is tried.

* A block with a `title` is a file that the reader saves: later blocks must use it.
* `python` without one is run as a program of its own, `sh` by bash that stops at the first error, all in one folder.
* Where a reader cannot run a block without more than this machine has, a comment before it says why,
  `<!-- only checked: REASON -->`: the program is compiled, and every `scepsy` command goes through its own parser.
* `text` is for people.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from markdown_it import MarkdownIt

import scepsy.cli

ONLY_CHECKED = re.compile(r"<!-- only checked: (\S.*?) -->")
TITLE = re.compile(r'title="([^"]+)"')
LONGEST_S = 300
LANGUAGES = {"python", "sh", "yaml", "csv", "text"}


@dataclass(frozen=True)
class Block:
    line: int
    language: str
    title: str
    text: str
    reason: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, those in admonitions as well, and indented ones as `sh`."""
    found = []
    reason = ""
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "html_block":
            told = ONLY_CHECKED.search(token.content)
            reason = told[1] if told else ""
        elif token.type in {"fence", "code_block"}:
            language, _, rest = token.info.partition(" ")
            title = TITLE.search(rest)
            line = token.map[0] + 1
            found.append(Block(line, language or "sh", title[1] if title else "", token.content, reason))
            reason = ""
    return found


def commands(text: str) -> list[list[str]]:
    """The words of every command of a shell block."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        lexer.commenters = "#"
        words = []
        for word in [*lexer, ";"]:
            if set(word) <= set("();<>|&"):
                found.append(words)
                words = []
            else:
                words.append(word)
    return [words for words in found if words]


def parse_command(words: list[str]) -> argparse.Namespace:
    """What the command line makes of `scepsy WORDS`, without doing it. SystemExit where it refuses them."""
    parsed = []
    module = f"scepsy.cli.{words[0]}"
    if words[0] in scepsy.cli.COMMANDS:
        __import__(module)
        with patch.object(sys.modules[module], "run", lambda args, _console: parsed.append(args) or 0):
            scepsy.cli.main(words)
    if not parsed:
        raise SystemExit(f"no such command: scepsy {' '.join(words)}")
    return parsed[0]


def check(block: Block) -> None:
    """All that can be said of a block without running it."""
    if block.language == "python":
        compile(block.text, f"line {block.line}", "exec")
    elif block.language == "sh":
        for words in commands(block.text):
            if words[0] == "scepsy":
                parse_command(words[1:])


@dataclass(frozen=True)
class Reader:
    """Somebody who follows a page in a folder of their own."""

    folder: Path
    environment: dict[str, str]
    ports: dict[str, str]

    def run(self, block: Block) -> None:
        """Do what the block says; the page's ports are replaced by free ones."""
        text = block.text
        for written, free in self.ports.items():
            text = re.sub(rf"\b{written}\b", free, text)
        if block.title:
            (self.folder / block.title).write_text(text)
            return
        words = [sys.executable, "-c"] if block.language == "python" else ["bash", "-euo", "pipefail", "-c"]
        with (
            tempfile.TemporaryFile("w+") as shown,
            subprocess.Popen(
                [*words, text],
                cwd=self.folder,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=shown,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as running,
        ):
            try:
                code = running.wait(LONGEST_S)
            finally:
                # What the block has started in the background ends with it, whether or not the block says so.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(running.pid, signal.SIGKILL)
            shown.seek(0)
            output = shown.read()
        assert code == 0, f"line {block.line}:\n{block.text}\n{output}"
        assert "Traceback" not in output, output
