"""Every code block of the documentation, as its reader runs it."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("doc_blocks", Path(__file__).with_name("blocks.py"))
doc_blocks = importlib.util.module_from_spec(_spec)
sys.modules["doc_blocks"] = doc_blocks
_spec.loader.exec_module(doc_blocks)

ROOT = Path(__file__).parents[2]
PAGES = {str(page.relative_to(ROOT)): page for page in sorted((ROOT / "docs").rglob("*.md"))}
RUN = [name for name, page in PAGES.items() if any(block.language != "text" for block in doc_blocks.blocks(page))]
# Commands of the README that need nothing but traces, profiles and a plan.
README_RUNS = ("scepsy report ", "scepsy optimize ", "scepsy replay ")


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture
def reader(models, tmp_path):
    """A folder with the examples in it, an endpoint, and `scepsy` on the path; what it deploys ends with it."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    binaries = tmp_path / ".bin"
    binaries.mkdir()
    ports = {"8000": free_port(), "4318": free_port()}
    # The endpoint's usual port may be somebody else's here; that of manifests is nobody's.
    (binaries / "scepsy").write_text(
        f'#!/bin/sh\ncase "$1 $*" in *--port*|*kubernetes*) ;; deploy*) set -- "$@" --port {ports["8000"]};; esac\n'
        f'exec {sys.executable} -m scepsy "$@"\n'
    )
    (binaries / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for program in binaries.iterdir():
        program.chmod(0o755)
    environment = {
        "PATH": f"{binaries}:/usr/bin:/bin",
        "OPENAI_BASE_URL": models.url,
        "OPENAI_API_KEY": "none",
        "SCEPSY_HOME": str(tmp_path / ".home"),
        "COLUMNS": "100",
    }
    found = doc_blocks.Reader(tmp_path, environment, ports)
    yield found
    deployments = tmp_path / ".home" / "deployments"
    for deployment in deployments.iterdir() if deployments.exists() else ():
        # One that the page has stopped itself is refused.
        subprocess.run([binaries / "scepsy", "stop", deployment.name], env=os.environ | environment)


@pytest.mark.docs
@pytest.mark.parametrize("name", RUN)
def test_every_block_does_what_it_says(name, reader):
    blocks = doc_blocks.blocks(PAGES[name])
    for number, block in enumerate(blocks):
        assert block.language in doc_blocks.LANGUAGES, f"line {block.line}: {block.language!r}"
        doc_blocks.check(block)
        if block.title:
            used = [later.text for later in blocks[number + 1 :] if not later.reason]
            assert any(block.title in text for text in used), f"{block.title} is never used"
        if not block.reason and block.language != "text":
            reader.run(block)


@pytest.mark.docs
def test_the_readme(reader):
    """Its programs and commands are run, or where they need more than this machine has, parsed."""
    blocks = doc_blocks.blocks(ROOT / "README.md")
    program = next(block for block in blocks if block.language == "python")
    reader.run(program)
    example = "for i in {1..10}; do python examples/plain_asyncio.py; done"
    reader.run(doc_blocks.Block(0, "sh", "", example, ""))
    ran = 0
    for block in blocks:
        doc_blocks.check(block)
        for line in block.text.splitlines() if block.language == "sh" else ():
            if line.startswith(README_RUNS):
                reader.run(doc_blocks.Block(block.line, "sh", "", line, ""))
                ran += 1
    assert ran >= len(README_RUNS)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scepsy stop # end it", [["scepsy", "stop"]]),
        ("scepsy deploy p.yaml \\\n  --to ray", [["scepsy", "deploy", "p.yaml", "--to", "ray"]]),
        ("scepsy deploy 'a b' | kubectl apply -f -", [["scepsy", "deploy", "a b"], ["kubectl", "apply", "-f", "-"]]),
    ],
)
def test_commands_are_found(text, words):
    assert doc_blocks.commands(text) == words


def test_wrong_commands_are_refused(capsys):
    doc_blocks.check(doc_blocks.Block(1, "sh", "", "scepsy stop --on ray", ""))
    for wrong in ("scepsy deploy p.yaml --no-such-option", "scepsy nonsense", "scepsy plan nonsense"):
        with pytest.raises(SystemExit):
            doc_blocks.check(doc_blocks.Block(1, "sh", "", wrong, ""))
    with pytest.raises(SyntaxError):
        doc_blocks.check(doc_blocks.Block(1, "python", "", "def f(:\n", ""))


def test_extras_that_pages_name_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {
        extra.strip()
        for page in [*PAGES.values(), ROOT / "README.md"]
        for found in re.findall(r"scepsy\[([a-z, -]+)\]", page.read_text())
        for extra in found.split(",")
    }
    assert named <= set(extras)
