"""A gateway on a socket of its own."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final

from aiohttp import web

from scepsy.deployment import probe
from scepsy.deployment.forward import MAX_BODY_BYTES, server_options
from scepsy.deployment.gateway import Gateway
from scepsy_optimizer.errors import ScepsyError

BACKLOG: Final = 1024


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket on that port, or with 0 on a free one. Raises ScepsyError if it is taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ScepsyError(_cannot_bind(error, host, port)) from error
    with listener:
        yield listener


@asynccontextmanager
async def served(gateway: Gateway, listener: socket.socket) -> AsyncIterator[None]:
    """The gateway answers on the socket while the block runs."""
    app = web.Application(client_max_size=MAX_BODY_BYTES)
    gateway.add_routes(app)
    runner = web.AppRunner(app, shutdown_timeout=0.1, **server_options())
    await runner.setup()
    try:
        await web.SockSite(runner, listener, backlog=BACKLOG).start()
        yield
    finally:
        await runner.cleanup()


def _cannot_bind(error: OSError, host: str, port: int) -> str:
    if error.errno != errno.EADDRINUSE:
        return f"cannot listen on {host}:{port}: {error.strerror}"
    owners = [str(pid) for pid in probe.listeners(port) if pid is not None]
    by = f" by process {', '.join(owners)}" if owners else ""
    return f"port {port} on {host} is in use{by}; end that, or give another port (--port)"
