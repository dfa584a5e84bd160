"""Imports run one way, and importing scepsy in an agent stays cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import scepsy
import scepsy_integrations
import scepsy_optimizer

ALLOWED = {
    "scepsy_optimizer": {"scepsy_optimizer"},
    "scepsy": {"scepsy", "scepsy_optimizer"},
    "scepsy_integrations": {"scepsy_integrations", "scepsy.capture", "scepsy.semconv"},
}
HOMES = {
    name: Path(module.__file__).parent
    for name, module in (
        ("scepsy", scepsy),
        ("scepsy_integrations", scepsy_integrations),
        ("scepsy_optimizer", scepsy_optimizer),
    )
}
EFFECTS = {"asyncio", "datetime", "io", "logging", "os", "pathlib", "random", "secrets", "socket", "subprocess", "time"}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            yield module
            if module in HOMES:
                yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("root", sorted(HOMES))
def test_imports_run_one_way(root):
    files = sorted(HOMES[root].rglob("*.py"))
    assert files
    for path in files:
        for module in imported_modules(path):
            if module.split(".")[0] not in HOMES or module == root:
                continue
            assert any(module == ok or module.startswith(f"{ok}.") for ok in ALLOWED[root]) or (
                root == "scepsy_integrations" and module == "scepsy"
            ), f"{path}: {root} may not import {module}"


def test_the_optimizer_has_no_side_door():
    """No clock, file, environment, log or randomness that was not passed in."""
    for path in HOMES["scepsy_optimizer"].rglob("*.py"):
        reached = {module.split(".")[0] for module in imported_modules(path)} & EFFECTS
        assert not reached, f"{path}: {reached}"


def test_importing_scepsy_in_an_agent_costs_only_opentelemetry():
    heavy = "numpy networkx yaml rich pydantic aiohttp pandas openai langchain_core llama_index"
    code = (
        "import sys, scepsy; scepsy.workflow; scepsy.instrument; "
        f"print([name for name in {heavy.split()!r} if name in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
