"""The endpoint's two kinds, and the routers that others would put there, each in front of one engine.

Those of others are in an environment of their own; what cannot be installed or started is named, with the reason.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import psutil
import uvloop
from aiohttp import web

from benchmarks.endpoint_load import MODEL, request
from scepsy.collect import Recorder, TraceStore
from scepsy.deployment import haproxy
from scepsy.deployment.backends import Backend, Pool
from scepsy.deployment.connections import connections
from scepsy.deployment.forward import MAX_BODY_BYTES, server_options
from scepsy.deployment.front import HAProxyFront
from scepsy.deployment.gateway import Gateway
from scepsy.deployment.processes import free_ports

ROOT: Final = Path(__file__).resolve().parent.parent
ENVIRONMENT: Final = ROOT / ".venv-routers"
PACKAGES: Final = {"vllm-router": "vllm-router==0.1.17", "SMG": "smg==1.13.0"}
_READY_S: Final = 30.0
# What is written down by hand for one model: leastconn, and the model looked up in the body.
_HAPROXY: Final = """
global
    nbthread {threads}
    tune.bufsize 131072
defaults
    mode http
    option http-buffer-request
    option http-no-delay
    timeout connect 5s
    timeout client 1h
    timeout server 1h
frontend in
    bind 127.0.0.1:{port}
    use_backend m if {{ req.body,json_query('$.model') -m str m }}
backend m
    balance leastconn
    server m-0 127.0.0.1:{engine}
"""


class AbsentError(Exception):
    """A router that cannot be measured here; the message says why."""


class Running:
    """A router that answers: its port and its processes."""

    def __init__(self, port: int, pid: int) -> None:
        self.port = port
        self._root = psutil.Process(pid)

    def _all(self) -> list[psutil.Process]:
        return [self._root, *self._root.children(recursive=True)]

    def cpu_us(self) -> float:
        """Processor time of all its threads so far, as the scheduler counts it (Linux, /proc/PID/schedstat)."""
        spent_ns = 0
        for process in self._all():
            for thread in Path(f"/proc/{process.pid}/task").iterdir():
                spent_ns += int((thread / "schedstat").read_text().split()[0])
        return spent_ns / 1000

    def memory_mib(self) -> float:
        """Resident memory of all its processes."""
        return float(sum(process.memory_info().rss for process in self._all())) / (1 << 20)


def prepare(name: str) -> Path:
    """The folder with the programs of a router of others. Raises AbsentError."""
    marker = ENVIRONMENT / f".{name}"
    if not marker.exists() or marker.read_text(encoding="utf-8") != PACKAGES[name]:
        print(f"installing {PACKAGES[name]} into {ENVIRONMENT.name} ...", file=sys.stderr, flush=True)
        python = ENVIRONMENT / "bin" / "python"
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGES[name]]
        done = subprocess.run(install, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise AbsentError(f"cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        marker.write_text(PACKAGES[name], encoding="utf-8")
    return ENVIRONMENT / "bin"


@contextmanager
def process(target: Callable[..., None], *args: object) -> Iterator[tuple[int, int]]:
    """Run a server of ours in a process; gives its port and its id."""
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=target, args=(there, *args), daemon=True)
    child.start()
    there.close()
    try:
        assert child.pid is not None
        yield here.recv(), child.pid
    finally:
        child.kill()
        child.join()


def _run_gateway(told: Connection, engine: int, traces: str | None, front: str | None) -> None:
    """The gateway with one replica; recording into `traces`, behind HAProxy with its files in `front`."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            engines = await stack.enter_async_context(connections())
            recorder = None
            if traces is not None:
                recorder = Recorder(TraceStore(Path(traces)))
                await stack.enter_async_context(recorder.recording())
            backend = Backend(id="m-0", llm=MODEL, url=f"http://127.0.0.1:{engine}", ready=True)
            pools = {MODEL: Pool([backend])}
            app = web.Application(client_max_size=MAX_BODY_BYTES)
            gateway = Gateway(pools, engines, models={}, status=dict, recorder=recorder)
            gateway.add_routes(app)
            runner = web.AppRunner(app, **server_options())
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0, backlog=4096).start()
            port = runner.addresses[0][1]
            if front is not None:
                listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
                await _front(gateway, pools, Path(front)).start(listener, port)
                port = listener.getsockname()[1]
            told.send(port)
            await asyncio.Event().wait()

    uvloop.run(main())


def _front(gateway: Gateway, pools: dict[str, Pool], directory: Path) -> HAProxyFront:
    (directory / "logs").mkdir()
    return HAProxyFront(
        gateway,
        pools,
        directory=directory,
        api_key=None,
        session_header=None,
        on_change=lambda: None,
        on_event=print,
    )


@contextmanager
def gateway(engine: int) -> Iterator[Running]:
    """The endpoint as it is by default."""
    with process(_run_gateway, engine, None, None) as (port, pid):
        yield Running(port, pid)


@contextmanager
def recording(engine: int) -> Iterator[Running]:
    """The endpoint with every call recorded."""
    with tempfile.TemporaryDirectory() as folder, process(_run_gateway, engine, folder, None) as (port, pid):
        yield Running(port, pid)


@contextmanager
def behind_haproxy(engine: int) -> Iterator[Running]:
    """The endpoint with HAProxy before it; the gateway behind it counts as well."""
    with tempfile.TemporaryDirectory() as folder, process(_run_gateway, engine, None, folder) as (port, pid):
        yield Running(port, pid)


@contextmanager
def plain_haproxy(engine: int) -> Iterator[Running]:
    """HAProxy with a configuration written by hand."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "haproxy.cfg"
        threads = len(os.sched_getaffinity(0))
        file.write_text(_HAPROXY.format(threads=threads, port=port, engine=engine), encoding="utf-8")
        with _program([haproxy.find_binary(), "-db", "-f", str(file)], port, Path(folder)) as running:
            yield running


@contextmanager
def smg(engine: int) -> Iterator[Running]:
    """SMG with its workers from a file, least loaded first."""
    program = prepare("SMG") / "smg"
    port, metrics = free_ports(2)
    with tempfile.TemporaryDirectory() as folder:
        workers = Path(folder) / "workers.json"
        workers.write_text(json.dumps({"version": 1, "workers": [{"url": f"http://127.0.0.1:{engine}"}]}))
        words = [str(program), "launch", "--host", "127.0.0.1", "--port", str(port)]
        words += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics), "--policy", "least_load"]
        words += ["--discovery-provider", "file", "--discovery-file", str(workers)]
        with _program([*words, "--worker-startup-check-interval", "1"], port, Path(folder)) as running:
            yield running


@contextmanager
def vllm_router(engine: int) -> Iterator[Running]:
    """vLLM's router in the only mode in which it looks at the model; its workers are added when it runs."""
    program = prepare("vllm-router") / "vllm-router"
    port, metrics = free_ports(2)

    def add_worker() -> None:
        worker = json.dumps({"url": f"http://127.0.0.1:{engine}", "model_id": MODEL}).encode()
        head = {"Content-Type": "application/json"}
        asked = urllib.request.Request(f"http://127.0.0.1:{port}/workers", worker, head)
        urllib.request.urlopen(asked, timeout=5).close()  # noqa: S310 - our own

    words = [str(program), "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)]
    words += ["--enable-igw", "--policy", "round_robin"]
    with tempfile.TemporaryDirectory() as folder, _program(words, port, Path(folder), add_worker) as running:
        yield running


@contextmanager
def _program(
    words: list[str], port: int, folder: Path, prepare_it: Callable[[], None] | None = None
) -> Iterator[Running]:
    log = folder / "log"
    with log.open("wb") as output, subprocess.Popen(words, stdout=output, stderr=output) as program:
        try:
            _wait(program, port, log, prepare_it)
            yield Running(port, program.pid)
        finally:
            for child in psutil.Process(program.pid).children(recursive=True):
                child.kill()
            program.kill()


def _wait(program: subprocess.Popen[bytes], port: int, log: Path, prepare_it: Callable[[], None] | None) -> None:
    """Until a request goes through. Raises AbsentError."""
    deadline_s = time.monotonic() + _READY_S
    body = request(10).partition(b"\r\n\r\n")[2]
    while program.poll() is None and time.monotonic() < deadline_s:
        try:
            if prepare_it is not None:
                prepare_it()
                prepare_it = None
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
            status = connection.getresponse().status
            connection.close()
            if status == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["it says nothing"]
    raise AbsentError(f"does not answer: {last[0][:200]}")
