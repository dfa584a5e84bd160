"""The collector as a whole: receiver, proxy, files."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import web

from scepsy.collect.calls import Recorder
from scepsy.collect.joining import Joiner
from scepsy.collect.proxy import Upstream
from scepsy.collect.receiver import Receiver
from scepsy.collect.store import FILE_BYTES, TraceStore
from scepsy.deployment.connections import connections
from scepsy.deployment.forward import server_options
from scepsy_optimizer.errors import ScepsyError

DEFAULT_PORT: Final = 4318
"""OTLP over HTTP's."""
_MAX_BODY_BYTES: Final = 256 << 20
_FINISH_S: Final = 5.0


@dataclass(slots=True, kw_only=True)
class Counts:
    """What has been collected: spans received, calls recorded, files written."""

    url: str
    spans: int = 0
    calls: int = 0
    files: int = 0


@contextlib.asynccontextmanager
async def collecting(
    directory: str | Path,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    upstream: str | None = None,
    *,
    file_bytes: int = FILE_BYTES,
    keep_content: bool = False,
    joiner: Joiner | None = None,
) -> AsyncIterator[Counts]:
    """Collect while the block runs; at its end everything is written, and the counts are final.

    Receives OTLP at http://host:port/v1/traces. With `upstream`, the base URL of a server, everything else is passed on
    to it and its calls are recorded. A trace file is followed by the next at `file_bytes`. Unless `keep_content`,
    received attributes that hold prompts and answers are left out. Raises ScepsyError.
    """
    store = TraceStore(Path(directory), file_bytes=file_bytes)
    receiver = Receiver(store, keep_content=keep_content)
    recorder = Recorder(store, joiner)
    async with contextlib.AsyncExitStack() as stack:
        counts = Counts(url="")

        def count() -> None:
            counts.spans, counts.calls, counts.files = receiver.spans, recorder.calls, store.files

        stack.callback(count)
        stack.push_async_callback(store.close)
        await stack.enter_async_context(recorder.recording())
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        receiver.add_routes(app)
        if upstream is not None:
            behind = Upstream(upstream, await stack.enter_async_context(connections()), recorder)
            app.router.add_route("*", "/{path:.*}", behind.forward)
        runner = web.AppRunner(app, shutdown_timeout=_FINISH_S, **server_options())
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        try:
            await web.TCPSite(runner, host, port, backlog=1024).start()
        except OSError as error:
            reason = "it is in use" if error.errno == errno.EADDRINUSE else error.strerror
            raise ScepsyError(f"cannot listen on {host}:{port}: {reason}; give another --port") from error
        bound = int(runner.addresses[0][1])
        counts.url = f"http://[{host}]:{bound}" if ":" in host else f"http://{host}:{bound}"
        yield counts


def collect(
    directory: str | Path,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    upstream: str | None = None,
    *,
    file_bytes: int = FILE_BYTES,
    keep_content: bool = False,
    on_ready: Callable[[str], None] | None = None,
) -> Counts:
    """Collect until SIGINT or SIGTERM, as `collecting` does; `on_ready` is told the address. Raises ScepsyError."""

    async def run() -> Counts:
        told = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, told.set)
        async with collecting(
            directory, host, port, upstream, file_bytes=file_bytes, keep_content=keep_content
        ) as counts:
            if on_ready is not None:
                on_ready(counts.url)
            await told.wait()
        return counts

    return asyncio.run(run())
