"""The other instrumentations that capture is measured against, in an environment of their own.

All of them and Scepsy run on the very same frameworks, each in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parent.parent
ENVIRONMENT: Final = ROOT / ".venv-others"
PYTHON: Final = ENVIRONMENT / "bin" / "python"
PACKAGES: Final = (
    "openinference-instrumentation-langchain==0.1.80",
    "openinference-instrumentation-llama-index==4.6.1",
    "openinference-instrumentation-openai==0.1.66",
    "opentelemetry-instrumentation-genai-langchain==1.3b0",
    "opentelemetry-instrumentation-genai-llama-index==1.3b0",
    "opentelemetry-instrumentation-genai-openai==1.3b0",
    "opentelemetry-instrumentation-langchain==0.62.4",
    "opentelemetry-instrumentation-llamaindex==0.62.4",
    "opentelemetry-instrumentation-openai==0.62.4",
    "langchain",
    "langgraph",
    "aiohttp",
)
NAMES: Final = {
    "scepsy": "Scepsy",
    "scepsy-sdk": "Scepsy, on an SDK provider",
    "openinference": "OpenInference",
    "genai": "OTel GenAI",
    "traceloop": "Traceloop",
}


def prepare() -> None:
    """Make the environment, unless it is there."""
    marker = ENVIRONMENT / ".ready"
    if marker.exists():
        return
    print(f"preparing {ENVIRONMENT.name} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    install = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--pre"]
    subprocess.run([*install, "--editable", ".[examples]", *PACKAGES], cwd=ROOT, check=True)
    marker.touch()


def run_worker(module: str, name: str, *arguments: str, timeout_s: float = 900) -> Any:
    """Run `python -m module --worker name ...` in the environment; returns what it prints last, as JSON."""
    command = [str(PYTHON), "-W", "ignore", "-m", module, "--worker", name, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def turn_on(name: str, provider: Any, directory: str) -> None:
    """Instrument everything in this process with the instrumentation of that name."""
    for instrument in _instrumentors(name, provider, directory):
        instrument()


def _instrumentors(name: str, provider: Any, directory: str) -> list[Callable[[], Any]]:
    if name.startswith("scepsy"):
        import scepsy

        if name == "scepsy":
            return [lambda: scepsy.instrument(directory=directory)]
        return [lambda: scepsy.instrument(provider=provider)]
    classes: list[Any]
    if name == "openinference":
        from openinference.instrumentation import langchain, llama_index, openai

        classes = [langchain.LangChainInstrumentor, llama_index.LlamaIndexInstrumentor, openai.OpenAIInstrumentor]
    elif name == "genai":
        from opentelemetry.instrumentation.genai import langchain, llama_index, openai

        classes = [langchain.LangChainInstrumentor, llama_index.LlamaIndexInstrumentor, openai.OpenAIInstrumentor]
    elif name == "traceloop":
        from opentelemetry.instrumentation import langchain, llamaindex, openai

        classes = [langchain.LangchainInstrumentor, llamaindex.LlamaIndexInstrumentor, openai.OpenAIInstrumentor]
    else:
        raise ValueError(name)
    return [lambda made=made: made().instrument(tracer_provider=provider) for made in classes]
