"""Record the golden files of an engine's own spans anew: the real vLLM, a traced client, and `scepsy collect` between.

    .venv/bin/python tests/data/engine/record.py

Needs .venv-vllm (make test-vllm makes it). The model has random weights, the spans have no content.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import httpx
import openai

import scepsy

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
VLLM = ROOT / ".venv-vllm" / "bin" / "python"
ENGINE_PORT, COLLECTOR_PORT = 8371, 8372
URL = f"http://127.0.0.1:{ENGINE_PORT}"


def start_engine(folder):
    """A small model behind the real vLLM, which sends its spans to the collector."""
    model = folder / "model"
    argv = [VLLM, ROOT / "tests" / "vllm" / "make_model.py", model, "256", "4", "0"]
    subprocess.run(argv, check=True, capture_output=True)
    environment = {
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_SERVICE_NAME": "small",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    argv = [
        VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "small",
        "--port", str(ENGINE_PORT), "--max-model-len", "2048", "--max-num-seqs", "8", "--enforce-eager",
        "--otlp-traces-endpoint", f"http://127.0.0.1:{COLLECTOR_PORT}/v1/traces",
    ]  # fmt: skip
    with (folder / "engine.log").open("w") as log:
        return subprocess.Popen(argv, env=os.environ | environment, stdout=log, stderr=log)


def wait_until_ready(engine):
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{URL}/health", timeout=5).close()  # noqa: S310 - the engine just started
        except OSError:
            if engine.poll() is not None:
                raise
            time.sleep(1)
        else:
            return
    raise TimeoutError("the engine did not get ready")


def client(**options):
    return openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0, **options)


async def calls(using):
    """Two at once, a streamed one, and one of the older completions, whose id has an index at its end in the engine."""
    words = [{"role": "user", "content": "What limits tidal power?"}]
    asked = {"model": "small", "max_tokens": 12, "temperature": 0.0}
    await asyncio.gather(*(using.chat.completions.create(messages=words, **asked) for _ in range(2)))
    stream = await using.chat.completions.create(
        messages=words, stream=True, stream_options={"include_usage": True}, **asked
    )
    async for _ in stream:
        pass
    await using.completions.create(prompt="Tides", **asked)


@scepsy.workflow(name="context passed on")
async def with_context():
    async with client() as using:
        await calls(using)


@scepsy.workflow(name="context lost")
async def without_context():
    """As behind a proxy that drops headers that it does not know."""

    async def drop(request):
        request.headers.pop("traceparent", None)

    async with client(http_client=httpx.AsyncClient(event_hooks={"request": [drop]})) as using:
        await calls(using)


def main():
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        scepsy.instrument(directory=folder / "client")
        scepsy_command = Path(sys.executable).with_name("scepsy")
        argv = [scepsy_command, "collect", "-o", folder / "engine", "--port", str(COLLECTOR_PORT)]
        collector = subprocess.Popen(argv)
        engine = start_engine(folder)
        try:
            wait_until_ready(engine)
            asyncio.run(with_context())
            asyncio.run(without_context())
            scepsy.flush()
        finally:
            engine.terminate()
            engine.wait(60)
            time.sleep(1)
            collector.terminate()
            collector.wait(30)
        for name in ("client", "engine"):
            lines = [line for path in sorted((folder / name).rglob("*.jsonl")) for line in path.open("rb")]
            (HERE / f"{name}.jsonl").write_bytes(b"".join(map(without_places, lines)))


def without_places(line):
    """Without where things were installed and what the machine and its processes were called."""
    request = json.loads(line)
    for group in request["resourceSpans"]:
        kept = ("service.name", "telemetry.sdk.language", "vllm.instrumenting_module_name", "vllm.process_kind")
        named = group["resource"]["attributes"]
        group["resource"]["attributes"] = [pair for pair in named if pair["key"] in kept]
        for scope in group["scopeSpans"]:
            for span in scope["spans"]:
                span["attributes"] = [pair for pair in span["attributes"] if pair["key"] != "code.filepath"]
    return json.dumps(request, separators=(",", ":")).encode() + b"\n"


if __name__ == "__main__":
    main()
