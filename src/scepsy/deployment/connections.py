"""Connections to all servers, kept for a while for the next request."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from yarl import URL

from scepsy.deployment.upstream import Connection, NotConnectedError

# Shorter than what servers keep (vLLM: 5 s), so that a connection is seldom used when it is being closed.
_KEEP_ALIVE_S: Final = 3.0
CONNECT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a server is, and what is put before every path."""

    host: str
    port: int
    is_secure: bool
    prefix: bytes
    authority: bytes


@lru_cache(maxsize=1024)
def place_of(url: str) -> Place:
    """The place that a base URL names."""
    parsed = URL(url)
    return Place(
        host=parsed.host or "",
        port=parsed.port or 80,
        is_secure=parsed.scheme == "https",
        prefix=parsed.raw_path.rstrip("/").encode(),
        authority=parsed.raw_authority.rpartition("@")[2].encode(),
    )


class Connections:
    """Connections to any number of servers, the idle ones kept for a while."""

    def __init__(self) -> None:
        self._idle: dict[Place, list[tuple[Connection, float]]] = {}
        self._secure: ssl.SSLContext | None = None
        self._loop = asyncio.get_running_loop()
        self._sweeping: asyncio.TimerHandle | None = None

    async def get(self, place: Place) -> Connection:
        """A connection to use alone. Raises NotConnectedError."""
        idle = self._idle.get(place)
        while idle:
            connection, since_s = idle.pop()
            if not connection.is_closed and self._loop.time() - since_s < _KEEP_ALIVE_S:
                return connection
            connection.abort()
        if place.is_secure and self._secure is None:
            self._secure = ssl.create_default_context()
        secure = self._secure if place.is_secure else None
        try:
            async with asyncio.timeout(CONNECT_S):
                _, connection = await self._loop.create_connection(Connection, place.host, place.port, ssl=secure)
        except TimeoutError as error:
            raise NotConnectedError(f"no connection within {CONNECT_S:g} s") from error
        except OSError as error:
            raise NotConnectedError(str(error)) from error
        return connection

    def keep(self, place: Place, connection: Connection) -> None:
        """Give it back after an answer; what cannot be used again is closed."""
        if not connection.can_be_kept:
            connection.abort()
            return
        self._idle.setdefault(place, []).append((connection, self._loop.time()))
        if self._sweeping is None:
            self._sweeping = self._loop.call_later(_KEEP_ALIVE_S, self._sweep)

    def close(self) -> None:
        """Close all that are idle."""
        if self._sweeping is not None:
            self._sweeping.cancel()
        for idle in self._idle.values():
            for connection, _ in idle:
                connection.abort()
        self._idle.clear()

    def _sweep(self) -> None:
        self._sweeping = None
        before_s = self._loop.time() - _KEEP_ALIVE_S
        for place, idle in list(self._idle.items()):
            for connection, since_s in idle:
                if since_s <= before_s:
                    connection.abort()
            kept = [(connection, since_s) for connection, since_s in idle if not connection.is_closed]
            if kept:
                self._idle[place] = kept
            else:
                del self._idle[place]
        if self._idle:
            self._sweeping = self._loop.call_later(_KEEP_ALIVE_S, self._sweep)


@asynccontextmanager
async def connections() -> AsyncIterator[Connections]:
    """Connections that are closed at the end of the block."""
    made = Connections()
    try:
        yield made
    finally:
        made.close()
