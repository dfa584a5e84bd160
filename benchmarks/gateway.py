"""What the endpoint in front of the replicas costs: processor time per request and per streamed piece, latency added.

A bare server answers behind it and a bare client asks, so that nearly all that is measured is the gateway; each case
plainly and with every call recorded. Processor time is the gateway process's own: what else runs hardly moves it.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import uvloop
from aiohttp import web

from benchmarks.outcome import Bound, finish
from scepsy.collect import Recorder, TraceStore
from scepsy.deployment.backends import Backend, Pool
from scepsy.deployment.forward import MAX_BODY_BYTES, client, server_options
from scepsy.deployment.gateway import Gateway

REQUESTS = 3000
STREAMS = 64
PIECES = 200
PIECE_EVERY_S = 0.005
ANSWER = b'{"id":"x","model":"m","choices":[],"usage":{"prompt_tokens":9,"completion_tokens":3}}'
PIECE = b'data: {"id":"x","model":"m","choices":[{"index":0,"delta":{"content":" word"}}]}\n\n'
END = b"data: [DONE]\n\n"


class Server(asyncio.Protocol):
    """Answers every request at once; one whose path is /v1/completions with a stream of pieces."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is here."""
        self.transport: Any = transport
        self.received = bytearray()

    def data_received(self, data: bytes) -> None:
        """Answer what is complete."""
        self.received += data
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.received[:end]).lower()
        length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
        if len(self.received) < end + 4 + length:
            return
        self.received.clear()
        if b" /v1/completions " in head:
            self.tasks = asyncio.ensure_future(self.stream())
        else:
            head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(ANSWER)
            self.transport.write(head + ANSWER)

    async def stream(self) -> None:
        """A piece every few milliseconds."""
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(PIECES):
            self.transport.write(b"%x\r\n%s\r\n" % (len(PIECE), PIECE))
            await asyncio.sleep(PIECE_EVERY_S)
        self.transport.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(END), END))


def run_server(told: Connection) -> None:
    """The process behind the gateway."""

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(main())


def run_gateway(told: Connection, port: int, directory: str | None) -> None:
    """The gateway's process, with one replica; records into the directory if there is one."""

    async def main() -> None:
        async with AsyncExitStack() as stack:
            session = await stack.enter_async_context(client())
            recorder = None
            if directory is not None:
                recorder = Recorder(TraceStore(Path(directory)))
                await stack.enter_async_context(recorder.recording())
            pools = {"m": Pool([Backend(id="m-0", llm="m", url=f"http://127.0.0.1:{port}", ready=True)])}
            app = web.Application(client_max_size=MAX_BODY_BYTES)
            Gateway(pools, session, models={}, status=dict, recorder=recorder).add_routes(app)
            runner = web.AppRunner(app, **server_options())
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            told.send(runner.addresses[0][1])
            await asyncio.Event().wait()

    uvloop.run(main())


@contextmanager
def process(target: Callable[..., None], *args: object) -> Iterator[tuple[int, psutil.Process]]:
    """Run a server in a process; gives its port and the process."""
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=target, args=(there, *args), daemon=True)
    child.start()
    try:
        yield here.recv(), psutil.Process(child.pid)
    finally:
        child.kill()
        child.join()


def request(path: str, size: int) -> bytes:
    """A request as clients send them."""
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * size}], "max_tokens": 9}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def ask(port: int, size: int, clients: int, requests: int) -> list[float]:
    """Send requests one after another from each client; returns all latencies in seconds."""
    sent, latencies = request("/v1/chat/completions", size), []

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(requests // clients):
            begin_s = time.perf_counter()
            writer.write(sent)
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(ANSWER))
            latencies.append(time.perf_counter() - begin_s)
        writer.close()

    await asyncio.gather(*(one() for _ in range(clients)))
    return latencies


async def follow(port: int) -> None:
    """Read all streams at once."""

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request("/v1/completions", 1000))
        await reader.readuntil(END + b"\r\n0\r\n\r\n")
        writer.close()

    await asyncio.gather(*(one() for _ in range(STREAMS)))


def measure(server: int, directory: str | None) -> dict[str, float]:
    """All figures of one gateway, in microseconds."""
    figures = {}
    with process(run_gateway, server, directory) as (port, gateway):

        def cpu_us(work: Callable[[], object]) -> float:
            before = sum(gateway.cpu_times()[:2])
            work()
            return (sum(gateway.cpu_times()[:2]) - before) * 1e6

        uvloop.run(ask(port, 1000, 8, 400))
        for size in (1000, 64_000):
            spent = cpu_us(lambda size=size: uvloop.run(ask(port, size, 32, REQUESTS)))  # type: ignore[misc]
            figures[f"cpu_us_per_request_{size}"] = spent / REQUESTS
        through = statistics.median(uvloop.run(ask(port, 1000, 1, 1000)))
        direct = statistics.median(uvloop.run(ask(server, 1000, 1, 1000)))
        figures["added_p50_us"] = (through - direct) * 1e6
        figures["cpu_us_per_piece"] = cpu_us(lambda: uvloop.run(follow(port))) / (STREAMS * PIECES)
        figures["memory_mib"] = gateway.memory_info().rss / (1 << 20)
    return figures


def main() -> int:
    """Measure, print, judge."""
    with process(run_server) as (server, _), tempfile.TemporaryDirectory() as folder:
        plain, recorded = measure(server, None), measure(server, folder)
    print(f"{'':<28} {'plain':>9} {'recorded':>9}")
    for name, value in plain.items():
        print(f"{name:<28} {value:>9.1f} {recorded[name]:>9.1f}")
    bounds = [
        Bound(name="processor time per request of 1 kB, us", value=plain["cpu_us_per_request_1000"], at_most=450),
        Bound(name="processor time per request of 64 kB, us", value=plain["cpu_us_per_request_64000"], at_most=700),
        Bound(name="processor time per streamed piece, us", value=plain["cpu_us_per_piece"], at_most=40),
        Bound(
            name="processor time that recording adds per request of 1 kB, us",
            value=recorded["cpu_us_per_request_1000"] - plain["cpu_us_per_request_1000"],
            at_most=150,
        ),
    ]
    return finish("gateway", bounds, {"plain": plain, "recorded": recorded})


if __name__ == "__main__":
    sys.exit(main())
