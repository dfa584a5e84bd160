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
    """Make the environment, unless it is there with these packages."""
    marker = ENVIRONMENT / ".ready"
    wanted = "\n".join(PACKAGES)
    if marker.exists() and marker.read_text(encoding="utf-8") == wanted:
        return
    print(f"preparing {ENVIRONMENT.name} ...", flush=True)
    if not PYTHON.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    install = [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--pre"]
    subprocess.run([*install, "--editable", ".[examples]", *PACKAGES], cwd=ROOT, check=True)
    marker.write_text(wanted, encoding="utf-8")


def run_worker(module: str, name: str, *arguments: str, timeout_s: float = 900) -> Any:
    """Run `python -m module --worker name ...` in the environment; returns what it prints last, as JSON."""
    command = [str(PYTHON), "-W", "ignore", "-m", module, "--worker", name, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def turn_on(name: str, provider: Any, directory: str) -> Callable[[], None]:
    """Instrument everything in this process with the instrumentation of that name; the result turns it off."""
    if name.startswith("scepsy"):
        import scepsy

        if name == "scepsy":
            scepsy.instrument(directory=directory)
        else:
            scepsy.instrument(provider=provider)
        return scepsy.uninstrument
    instrumentors = [made() for made in _instrumentors(name)]
    for instrumentor in instrumentors:
        instrumentor.instrument(tracer_provider=provider)

    def turn_off() -> None:
        for instrumentor in instrumentors:
            instrumentor.uninstrument()

    return turn_off


def _instrumentors(name: str) -> list[Any]:
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
    return classes
