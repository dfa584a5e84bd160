"""Record the golden files anew: the same program under each instrumentation, in an environment of its own.

    python tests/data/golden/record.py [NAME ...]

Environments are made under build/ with plain pip. A name is a file here without its suffix, or of ../beside, where
Scepsy runs at the same time. Of several runs the one with the least time in spans is kept: what else the machine does
only ever makes calls longer.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
FRAMEWORKS = ["langchain==1.4.7", "langchain-openai==1.7.3", "opentelemetry-exporter-otlp-proto-common"]
LLAMA_INDEX = ["llama-index-core==0.14.25", "llama-index-llms-openai-like==0.8.1"]
RUNS = 3
REQUIREMENTS = {
    "scepsy": [*FRAMEWORKS, *LLAMA_INDEX, "--editable", str(ROOT)],
    "openinference": [
        *FRAMEWORKS,
        *LLAMA_INDEX,
        "openinference-instrumentation-langchain==0.1.80",
        "openinference-instrumentation-llama-index==4.6.1",
        "openinference-instrumentation-openai==0.1.66",
        "opentelemetry-sdk",
    ],
    "traceloop": [
        *FRAMEWORKS,
        *LLAMA_INDEX,
        "opentelemetry-instrumentation-langchain==0.62.4",
        "opentelemetry-instrumentation-llamaindex==0.62.4",
        "opentelemetry-instrumentation-openai==0.62.4",
        "opentelemetry-sdk",
    ],
    "opentelemetry": [
        *FRAMEWORKS,
        *LLAMA_INDEX,
        "opentelemetry-instrumentation-genai-langchain==1.3b0",
        "opentelemetry-instrumentation-genai-llama-index==1.3b0",
        "opentelemetry-instrumentation-genai-openai==1.3b0",
        "opentelemetry-sdk",
    ],
    "langfuse": [*FRAMEWORKS, "langfuse==5.0.4"],
}
for other in ("openinference", "traceloop", "opentelemetry", "langfuse"):
    REQUIREMENTS[f"{other}+scepsy"] = [*REQUIREMENTS[other], "--editable", str(ROOT)]


def main(names):
    for name in names or REQUIREMENTS:
        environment = ROOT / "build" / f"record-{name}"
        python = environment / "bin" / "python"
        if not python.exists():
            venv.create(environment, with_pip=True)
            argv = [python, "-m", "pip", "install", "--quiet", "--pre", *REQUIREMENTS[name]]
            subprocess.run(argv, check=True)
        with tempfile.TemporaryDirectory() as directory:
            runs = [Path(directory) / f"{number}.jsonl" for number in range(RUNS)]
            for out in runs:
                argv = [python, HERE / "program.py", name, out]
                quiet = {"TRACELOOP_TRACE_CONTENT": "false", "PYTHONWARNINGS": "ignore"}
                subprocess.run(argv, check=True, timeout=300, env=os.environ | quiet)
            best = min(runs, key=time_in_spans)
            file = (HERE.parent / "beside" if "+" in name else HERE) / f"{name}.jsonl"
            file.write_bytes(best.read_bytes())
        print(f"{name}: {time_in_spans(file) / 1e9:.3f} s in spans")


def time_in_spans(path):
    """Sum of all durations in a file, in nanoseconds."""
    total = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        for group in json.loads(line)["resourceSpans"]:
            for scope in group["scopeSpans"]:
                for span in scope["spans"]:
                    total += int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"])
    return total


if __name__ == "__main__":
    main(sys.argv[1:])
