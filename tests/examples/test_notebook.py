"""The notebook from top to bottom, in a kernel of its own, on traces that an example has just left."""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from scepsy.files import load_plan

EXAMPLES = Path(__file__).parents[2] / "examples"


# Jupyter's kernel manager leaves sockets and a resolved path to the collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_plots_and_plans(models, tmp_path, monkeypatch):
    environment = {
        "OPENAI_BASE_URL": models.url,
        "OPENAI_API_KEY": "none",
        "SCEPSY_TRACES": str(tmp_path / "traces"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    for question in ("Why is ice slippery?", "What limits tidal power?"):
        words = [sys.executable, str(EXAMPLES / "plain_asyncio.py"), question]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=os.environ | environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(EXAMPLES / "shares_and_frontier.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    done = client.execute()
    shown = [output for cell in done.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 2
    texts = "".join(output.get("text", "") for output in shown)
    assert "2 executions" in texts
    assert {part.llm for part in load_plan(tmp_path / "plan.yaml").llms} == {"writer", "verifier"}
