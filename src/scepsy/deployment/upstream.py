"""Connections to servers over which requests are forwarded: HTTP/1.1, kept for the next request, no more than needed.

A client library makes objects of what is only passed on; here the pieces of an answer go from the parser straight to
whoever takes them.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import httptools
from yarl import URL

# Shorter than what servers keep (vLLM: 5 s), so that a connection is seldom used when it is being closed.
_KEEP_ALIVE_S: Final = 3.0
CONNECT_S: Final = 5.0
# What nobody takes yet may be this much.
_EARLY_BYTES: Final = 1 << 18


class NotConnectedError(Exception):
    """The server could not be reached: nothing of the request was sent."""


class NoAnswerError(Exception):
    """The server closed the connection before the first byte of an answer."""


class BrokenOffError(Exception):
    """The server ended in the middle of an answer."""


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


class Connection(asyncio.Protocol):
    """One connection, and the answer that comes over it."""

    def __init__(self) -> None:
        self.is_closed = False
        self.is_over = False
        """Nothing more of the answer will come: it is whole, unless there is an `error`."""
        self.error: str | None = None
        self.status = 0
        self.reason = b""
        self.headers: list[tuple[bytes, bytes]] = []
        self._transport: Any = None
        self._parser = httptools.HttpResponseParser(self)
        self._loop = asyncio.get_running_loop()
        self._is_asked = self._is_begun = self._is_bodiless = self._is_bounded = self._is_lasting = False
        self._is_paused = False
        self._waiter: asyncio.Future[None] | None = None
        self._pieces: list[bytes] = []
        self._sink: Callable[[bytes], None] | None = None

    @property
    def can_be_kept(self) -> bool:
        """Whether another request can follow."""
        done = self.is_over and self.error is None and self._is_lasting and not self.is_closed
        return done and not self._is_paused and self._transport.get_write_buffer_size() == 0

    @property
    def has_length(self) -> bool:
        """Whether the answer says how long its body is."""
        return any(name.lower() == b"content-length" for name, _ in self.headers)

    @property
    def content_type(self) -> str:
        """Of the answer, without its parameters."""
        return self.header(b"content-type").partition(";")[0].strip().lower()

    def header(self, name: bytes) -> str:
        """The first header of that name, which is in small letters; empty if there is none."""
        return next((value.decode("latin-1") for key, value in self.headers if key.lower() == name), "")

    async def ask(self, head: bytes, body: bytes, *, is_bodiless: bool) -> None:
        """Send a request and wait for the head of its answer. Raises NoAnswerError.

        `is_bodiless` if the answer has no body whatever it says, as that to HEAD.
        """
        self._is_asked, self._is_bodiless = True, is_bodiless
        self.is_over = self._is_begun = self._is_bounded = self._is_lasting = False
        self._sink = None
        if self.is_closed or self._transport.is_closing():
            self._fail("it closed the connection")
        elif len(body) > _EARLY_BYTES:
            self._transport.write(head)
            self._transport.write(body)
        else:
            self._transport.write(head + body)
        while not self._is_begun:
            if self.is_over:
                raise NoAnswerError(self.error)
            await self.wait()

    def take(self) -> bytes:
        """What has come of the body since."""
        pieces, self._pieces = self._pieces, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def pass_to(self, sink: Callable[[bytes], None]) -> None:
        """From now on hand every piece over when it comes."""
        self._sink = sink
        self.resume()

    async def wait(self) -> None:
        """Until something has changed: the answer has begun, is over, or was paused."""
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def pause(self) -> None:
        """Read no more for now."""
        if not self._is_paused and not self.is_closed:
            self._is_paused = True
            self._transport.pause_reading()
            self._wake()

    def resume(self) -> None:
        """Read on."""
        if self._is_paused:
            self._is_paused = False
            if not self.is_closed:
                self._transport.resume_reading()

    def abort(self) -> None:
        """Close it at once."""
        self._is_asked = False
        self.is_closed = True
        if self._transport is not None:
            self._transport.abort()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The server is there."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Something of an answer, or what nobody has asked for."""
        if not self._is_asked or self.is_over:
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(f"it does not speak HTTP: {error}")
            self._transport.abort()
            return
        if self._pieces:
            if self._sink is not None:
                self._sink(self.take())
            elif sum(map(len, self._pieces)) > _EARLY_BYTES:
                self.pause()
        if self.is_over:
            self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """The server has closed the connection, or has gone."""
        self.is_closed = True
        if not self._is_asked or self.is_over:
            return
        if self._is_begun and error is None and not self._is_bounded:
            # The close is how an answer without a length ends.
            self.is_over = True
            self._wake()
        else:
            self._fail(str(error) if error is not None else "it closed the connection")

    # What the parser calls.

    def on_message_begin(self) -> None:
        """An answer, or a word before it such as 100 Continue."""
        if not self.is_over:
            self.headers, self.reason = [], b""

    def on_status(self, reason: bytes) -> None:
        """A part of the reason phrase."""
        if not self.is_over:
            self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; after the body, a trailer, which is left out."""
        if not self._is_begun:
            self.headers.append((name, value))
            self._is_bounded = self._is_bounded or name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self.status = self._parser.get_status_code()
        if self.is_over or self.status < 200:
            return
        self._is_begun = True
        # The parser does not know that no body follows: after this it is of no use.
        self.is_over = self._is_bodiless
        self._wake()

    def on_body(self, piece: bytes) -> None:
        """A piece of the body."""
        if not self.is_over:
            self._pieces.append(piece)

    def on_message_complete(self) -> None:
        """The answer is whole."""
        if self._is_begun:
            self._is_lasting = self._parser.should_keep_alive() and not self.is_over
            self.is_over = True

    def _fail(self, error: str) -> None:
        self.error = error
        self.is_over = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


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
