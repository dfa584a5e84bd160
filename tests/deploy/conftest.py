import asyncio
import base64
import contextlib
import gzip
import json
import os
import re
import socket
import sys
import time
import uuid
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from yarl import URL

from scepsy.deployment import deploy
from scepsy.deployment.backends import Backend, Pool
from scepsy.deployment.connections import connections
from scepsy.deployment.forward import MAX_BODY_BYTES, server_options
from scepsy.deployment.front import HAProxyFront
from scepsy.deployment.gateway import Gateway
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.plan import LLMPlan, Plan, Slot
from scepsy_optimizer.profile import LLMProfile, Provenance, StepTimes

STUB = Path(__file__).with_name("stub_engine.py")


@pytest.fixture(scope="session")
def make_profile():
    def make(llm="m", **changes):
        steps = StepTimes(
            tensor_parallel_size=1,
            batch_sizes=(1, 64),
            context_tokens=(256, 4096),
            decode_s=((0.004, 0.005), (0.008, 0.012)),
            prefill_tokens=(16, 4096),
            prefill_s=(0.004, 0.08),
            weights_gib=2.0,
            overhead_gib=1.0,
            kv_bytes_per_token=100_000.0,
        )
        return LLMProfile(
            llm=llm,
            model=f"models/{llm}",
            device_type="H100",
            steps=(steps,),
            provenance=Provenance(source="estimate", tool="made up", engine="vLLM", date="2026-01-01"),
            **{"device_memory_gib": 79.6, "max_model_len": 4096, **changes},
        )

    return make


@pytest.fixture(scope="session")
def make_part():
    def make(llm, *devices, fraction=1.0, node="node0", **changes):
        """A replica on each given device; a tuple of devices is a tensor-parallel group."""
        groups = [device if isinstance(device, tuple) else (device,) for device in devices]
        return LLMPlan(
            **{
                "llm": llm,
                "model": f"models/{llm}",
                "tensor_parallel_size": len(groups[0]),
                "fraction": fraction,
                "replicas": len(groups),
                "slots": tuple(Slot(node=node, devices=group) for group in groups),
                "max_num_seqs": 128,
                "max_num_batched_tokens": 4096,
                "max_model_len": 4096,
                "gpu_memory_utilization": 0.9,
                **changes,
            }
        )

    return make


@pytest.fixture(scope="session")
def make_plan():
    def make(*parts, cluster="2xCPU"):
        return Plan(cluster=parse_cluster(cluster), rate_rps=1.0, llms=parts)

    return make


@pytest.fixture(scope="session")
def stub_command():
    return [sys.executable, str(STUB)]


def marked_processes(mark):
    """Processes, the zombies among them left out, that were started with the mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append((int(entry.name), (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()))
            except OSError:
                continue
    return found


def wait_for(check, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not (value := check()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        time.sleep(0.02)
    return value


@pytest.fixture(scope="session")
def wait():
    return wait_for


@pytest.fixture
def process_table():
    """Everything started under this fixture carries a mark; at the end nothing marked may be left."""
    mark = f"scepsy-test-{uuid.uuid4().hex}"
    os.environ["SCEPSY_TEST_MARK"] = mark
    yield lambda: marked_processes(mark)
    del os.environ["SCEPSY_TEST_MARK"]
    assert marked_processes(mark) == []


@pytest.fixture
def home(tmp_path, monkeypatch, process_table):
    """Deployments are noted in a folder of the test's own, scratch folders made there too, and nothing is left."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("SCEPSY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(scratch))
    yield tmp_path / "home"
    assert list(scratch.iterdir()) == []


@pytest.fixture
def stub(home, make_plan, make_part, stub_command, monkeypatch, tmp_path):
    """Deploy stub engines on two cores; `behave` says how they behave at their next start."""
    behaviour = tmp_path / "behaviour"
    behaviour.write_text("")
    seen = tmp_path / "seen"
    seen.mkdir()
    monkeypatch.setenv("STUB_BEHAVIOUR", str(behaviour))
    monkeypatch.setenv("STUB_SEEN", str(seen))
    plan = make_plan(make_part("a", 0), make_part("b", 1))

    def start(**options):
        return deploy(**{"plan": plan, "engine": "vllm-cpu", "command": stub_command, **options})

    start.behave = behaviour.write_text
    start.seen = lambda: [json.loads(path.read_text()) for path in sorted(seen.iterdir())]
    return start


class Worker:
    """A replica that says what it received, byte for byte, or does what the request's `do` asks for."""

    def __init__(self):
        self.seen = []
        self.cancelled = asyncio.Event()
        self.release = asyncio.Event()

    @property
    def posted(self):
        """Without HAProxy's looks at its health."""
        return [seen for seen in self.seen if seen[1] != "/health"]

    async def handle(self, request):
        body = await request.read()
        self.seen.append((request.method, request.raw_path, request.raw_headers, body))
        do = _do(body)
        if do == "die":
            request.transport.abort()
            return web.Response()
        if do == "hang":
            try:
                await self.release.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        if do == "promise and die":
            await web.StreamResponse(headers={"Content-Type": "text/event-stream"}).prepare(request)
            request.transport.abort()
            return web.Response()
        if do in ("stream", "stream and die", "stream and hang"):
            return await self.stream(request, do)
        if do == "gzip":
            return web.Response(body=gzip.compress(b"packed"), headers={"Content-Encoding": "gzip"})
        if do == "empty":
            return web.Response(status=204)
        if do == "headers":
            answer = web.Response(status=418, reason="Short And Stout", text="x")
            answer.headers.add("Set-Cookie", "a=1")
            answer.headers.add("Set-Cookie", "b=2")
            answer.headers["Server"] = "vllm/1"
            answer.headers["X-Request-Id"] = "r1"
            answer.headers["Keep-Alive"] = "timeout=5"
            return answer
        headers = [(name.decode(), value.decode("latin-1")) for name, value in request.raw_headers]
        return web.json_response(
            {
                "method": request.method,
                "path": request.raw_path,
                "headers": headers,
                "body": base64.b64encode(body).decode(),
            }
        )

    async def stream(self, request, do):
        answer = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await answer.prepare(request)
        await answer.write(b"data: one\n\n")
        try:
            await self.release.wait()
            if do == "stream and hang":
                await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if do == "stream and die":
            request.transport.abort()
            return answer
        await answer.write(b"data: two\n\n")
        return answer


def _do(body):
    try:
        return json.loads(body).get("do")
    except (ValueError, AttributeError):
        return None


@contextlib.asynccontextmanager
async def listening(handler):
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1, **server_options())
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class Stage:
    """A gateway over workers: `small` has two replicas, `big/one` has one."""

    def __init__(self):
        self.workers = {name: Worker() for name in ("small-0", "small-1", "big-0")}
        self.backends = {}
        self.pools = {}
        self.url = ""
        self.front = None
        self.events = []

    @property
    def seen(self):
        """What all workers have received."""
        return [seen for worker in self.workers.values() for seen in worker.posted]

    def release(self):
        for worker in self.workers.values():
            worker.release.set()

    async def change(self, name, **values):
        """Set what a backend is, and wait until the endpoint knows."""
        for key, value in values.items():
            setattr(self.backends[name], key, value)
        self.pools[self.backends[name].llm].changed()
        await self.known()

    async def known(self):
        if self.front is not None:
            await self.front.count()

    def load(self, name):
        return self.backends[name].outstanding + self.backends[name].outstanding_beside

    async def raw(self, text, *, head=False):
        """Send bytes, half-close nothing, read all that comes until a complete answer or the end."""
        reader, writer = await asyncio.open_connection("127.0.0.1", int(self.url.rsplit(":", 1)[1]), limit=1 << 22)
        try:
            writer.write(text.encode())
            start = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            length = None if head else re.search(rb"content-length: (\d+)", start, re.IGNORECASE)
            body = await asyncio.wait_for(reader.readexactly(int(length[1])) if length else reader.read(), 5)
        finally:
            writer.close()
            await writer.wait_closed()
        return start + body

    async def post(self, session, body, path="/v1/chat/completions", **options):
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        return await session.post(URL(self.url + path, encoded=True), data=data, **options)


@pytest.fixture
async def stage(request, tmp_path):
    stage = Stage()
    async with contextlib.AsyncExitStack() as stack:
        for name, worker in stage.workers.items():
            url = await stack.enter_async_context(listening(worker.handle))
            llm = "small" if name.startswith("small") else "big/one"
            stage.backends[name] = Backend(id=name, llm=llm, url=url, ready=True)
        engines = await stack.enter_async_context(connections())
        for llm in ("small", "big/one"):
            backends = [backend for backend in stage.backends.values() if backend.llm == llm]
            stage.pools[llm] = Pool(backends, wait_s=0.1)
        models = {llm: {"id": llm, "object": "model", "created": 1, "owned_by": "scepsy"} for llm in stage.pools}
        options = dict(getattr(request, "param", {}))
        is_fronted = options.pop("front", False)
        stage.gateway = Gateway(stage.pools, engines, models=models, status=lambda: {"name": "test"}, **options)
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        stage.gateway.add_routes(app)
        runner = web.AppRunner(app, shutdown_timeout=0.1, **server_options())
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        if is_fronted:
            (tmp_path / "logs").mkdir()
            affinity = options.get("affinity")
            stage.front = HAProxyFront(
                stage.gateway,
                stage.pools,
                directory=tmp_path,
                api_key=options.get("api_key"),
                session_header=affinity.header if affinity else None,
                on_change=lambda: None,
                on_event=stage.events.append,
            )
            listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            await stage.front.start(listener, port)
            stack.push_async_callback(stage.front.drain, 0.0)
            port = listener.getsockname()[1]
        stage.endpoint = stage.front or stage.gateway
        stage.url = f"http://127.0.0.1:{port}"
        yield stage


@pytest.fixture
async def session():
    """A client whose answers a test may leave unread: each lives, and holds its connection, until the test ends."""
    answers = []

    async def keep(_session, _context, params):
        answers.append(params.response)

    traced = aiohttp.TraceConfig()
    traced.on_request_end.append(keep)
    async with aiohttp.ClientSession(auto_decompress=False, trace_configs=[traced]) as session:
        yield session
        for answer in answers:
            answer.close()
