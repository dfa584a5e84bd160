"""A connection to a server over which requests are forwarded: HTTP/1.1, and no more of it than that needs.

A client library makes objects of what is only passed on; here the pieces of an answer go from the parser straight to
whoever takes them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import httptools

# What nobody takes yet may be this much.
_EARLY_BYTES: Final = 1 << 18


class NotConnectedError(Exception):
    """The server could not be reached: nothing of the request was sent."""


class NoAnswerError(Exception):
    """The server closed the connection before the first byte of an answer."""


class BrokenOffError(Exception):
    """The server ended in the middle of an answer."""


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

    async def first_piece(self) -> None:
        """Wait until something of the body is there, or the answer is over. Raises NoAnswerError if it broke before."""
        while not self._pieces and not self.is_over:
            await self.wait()
        if self.error is not None and not self._pieces:
            raise NoAnswerError(self.error)

    def take(self) -> bytes:
        """What has come of the body since."""
        pieces, self._pieces = self._pieces, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def pass_to(self, sink: Callable[[bytes], None]) -> None:
        """From now on hand every piece over when it comes."""
        self._sink = sink
        self.resume()

    async def wait(self) -> None:
        """Until something has changed: the answer or its body has begun, is over, or was paused."""
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
            else:
                if sum(map(len, self._pieces)) > _EARLY_BYTES:
                    self.pause()
                self._wake()
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
