"""Answers that are read bit by bit: each is followed to its end, whoever reads it."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

from scepsy.capture import Exchange, harmless
from scepsy_integrations.openai.answers import describe, extras, fields, is_raw, note_identity, note_timings, note_usage
from scepsy_integrations.openai.content import Spoken, note_answer, records_content

_READ_LIMIT_BYTES: Final = 1 << 20
"""How much of a body that the program reads as bytes is kept to look for its usage."""


def watch(exchange: Exchange, answer: Any) -> bool:
    """If the answer is still to be read, follow it to its end and return True."""
    if is_raw(answer):
        if not exchange.streamed:
            return False
        answer = answer.parse()  # only builds the stream; the program's own parse() returns this very object
    known = fields(answer)
    if "_iterator" in known:
        _follow_stream(exchange, answer, known["response"])
        return True
    http = known.get("http_response")
    if http is not None and not http.is_closed:
        _follow_bytes(exchange, http)
        return True
    return False


def _follow_stream(exchange: Exchange, stream: Any, http: Any) -> None:
    exchange.received(answer=False)
    spoken = Spoken(exchange.handle) if records_content(exchange) else None
    pieces = stream._iterator  # noqa: SLF001 - the public ways (subclass, proxy) change the type that the program gets
    # Not by the stream itself: another instrumentation's proxy around it may have both sorts of methods.
    reader = (_AsyncReader if hasattr(pieces, "__anext__") else _Reader)(
        exchange,
        pieces,
        functools.partial(_take_event, exchange, spoken),
        None if spoken is None else spoken.note,
    )
    stream._iterator = reader  # noqa: SLF001 - as above
    _on_close(http, reader.closed)


class _Followed:
    """Common to the readers below: what a piece, an end and a failure mean."""

    def __init__(
        self,
        exchange: Exchange,
        pieces: Any,
        take: Callable[[Any], bool | None],
        before_end: Callable[[], None] | None,
    ) -> None:
        self.exchange = exchange
        self.pieces = pieces
        self.take = take
        """Takes note of a piece; True keeps it from the program."""
        self.before_end = before_end
        self.reading = False

    @harmless
    def done(self) -> None:
        """The answer is complete."""
        try:
            self.settle()
        finally:
            self.exchange.succeed()

    @harmless
    def failed(self, error: BaseException) -> None:
        """Reading it failed."""
        try:
            self.settle()
        finally:
            self.exchange.fail(error)

    @harmless
    def closed(self) -> None:
        """The response was closed: by the stream itself at its end, or by the program before that."""
        if self.reading or self.exchange.end_ns is not None:
            return
        try:
            self.settle()
        finally:
            self.exchange.abandon()

    def settle(self) -> None:
        """All that will be read has been."""
        if self.before_end is not None:
            self.before_end()

    def __del__(self) -> None:
        self.closed()


@harmless
def _take_event(exchange: Exchange, spoken: Spoken | None, piece: Any) -> bool:
    # This runs for every piece of every stream: no step of it that the piece at hand does not need.
    known = fields(piece)
    if spoken is not None:
        spoken.add(known)
    choices = known.get("choices")
    if choices is None:
        generated = (known.get("type") or "").endswith(".delta")  # an event of the responses API
        exchange.received(answer=generated, generated=generated)
        whole = known.get("response")
        if whole is not None:
            describe(exchange, whole)
        return False
    exchange.received(answer=bool(choices), generated=bool(choices) and _generates(choices[0]))
    if exchange.chunks <= 1:
        note_identity(exchange, known)
    usage = known.get("usage")
    if usage is not None:
        note_usage(exchange, usage)
    extra = extras(piece)
    if extra:
        note_timings(exchange, extra)
    return exchange.hides_usage and usage is not None and not choices


def _generates(choice: Any) -> bool:
    known = fields(choice)
    delta = known.get("delta")
    if delta is None:
        return bool(known.get("text"))
    made = fields(delta)
    # What openai's models do not know counts as well: servers stream a model's reasoning under several names.
    return bool(made.get("content") or made.get("tool_calls") or extras(delta))


class _Reader(_Followed):
    """Takes the place of the iterator inside a Stream."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while True:
            self.reading = True
            try:
                piece = next(self.pieces)
            except StopIteration:
                self.done()
                raise
            except BaseException as error:
                self.failed(error)
                raise
            finally:
                self.reading = False
            if not self.take(piece):
                return piece

    def close(self) -> None:
        """As generators have it."""
        self.pieces.close()
        self.closed()


class _AsyncReader(_Followed):
    """Takes the place of the iterator inside an AsyncStream."""

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        while True:
            self.reading = True
            try:
                piece = await anext(self.pieces)
            except StopAsyncIteration:
                self.done()
                raise
            except BaseException as error:
                self.failed(error)
                raise
            finally:
                self.reading = False
            if not self.take(piece):
                return piece

    async def aclose(self) -> None:
        """As async generators have it."""
        await self.pieces.aclose()
        self.closed()


def _on_close(http: Any, closed: Callable[[], None]) -> None:
    """Call `closed` whenever the HTTP response is closed."""
    if hasattr(http, "aclose") and _is_async(http):
        aclose = http.aclose

        async def async_close() -> None:
            try:
                await aclose()
            finally:
                closed()

        http.aclose = async_close
    else:
        close = http.close

        def sync_close() -> None:
            try:
                close()
            finally:
                closed()

        http.close = sync_close


def _is_async(http: Any) -> bool:
    return hasattr(http.stream, "__aiter__") and not hasattr(http.stream, "__iter__")


def _follow_bytes(exchange: Exchange, http: Any) -> None:
    """Follow a body that the program reads itself, line by line, in bytes or whole (`with_streaming_response`)."""
    exchange.received(answer=False)
    body = _Body(exchange)
    if _is_async(http):
        aiter_bytes = http.aiter_bytes
        http.aiter_bytes = lambda chunk_size=None: body.reader(_AsyncReader, aiter_bytes(chunk_size))
    else:
        iter_bytes = http.iter_bytes
        http.iter_bytes = lambda chunk_size=None: body.reader(_Reader, iter_bytes(chunk_size))
    _on_close(http, body.closed)


class _Body:
    """The bytes that passed, so that their usage can be read when all have."""

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.kept = bytearray()
        self.current: _Followed | None = None

    def reader(self, kind: type[_Followed], pieces: Any) -> _Followed:
        self.current = kind(self.exchange, pieces, self.take, self.describe)
        return self.current

    @harmless
    def take(self, chunk: bytes) -> None:
        self.exchange.received()
        if len(self.kept) < _READ_LIMIT_BYTES:
            self.kept.extend(chunk)

    def describe(self) -> None:
        _describe_body(self.exchange, bytes(self.kept))

    def closed(self) -> None:
        if self.current is None:
            self.exchange.abandon()
        else:
            self.current.closed()


def _describe_body(exchange: Exchange, body: bytes) -> None:
    spoken = Spoken(exchange.handle) if records_content(exchange) else None
    if body.startswith(b"data:") or b"\ndata:" in body:
        for line in body.splitlines():
            if not line.startswith(b"data: {"):
                continue
            if spoken is not None or b'"usage"' in line or b'"metrics"' in line:
                event = json.loads(line[5:])
                describe(exchange, event.get("response", event))
                if spoken is not None:
                    spoken.add(event)
        if spoken is not None:
            spoken.note()
    elif body.startswith(b"{"):
        answer = json.loads(body)
        describe(exchange, answer)
        if spoken is not None:
            note_answer(exchange.handle, answer)
