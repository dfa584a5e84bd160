"""Answers that are read bit by bit: each is followed to its end, whoever reads it."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

from scepsy.capture import Exchange, harmless, tell
from scepsy_integrations.openai.answers import describe, extras, is_raw, note_identity, note_timings, note_usage
from scepsy_integrations.openai.content import Spoken, note_answer, records_content

_NOTHING: Final[dict[str, Any]] = {}
_TAKING: Final = "a piece of a stream"
_READ_LIMIT_BYTES: Final = 1 << 20
"""How much of a body that the program reads as bytes is kept to look for its usage."""


def watch(exchange: Exchange, answer: Any) -> bool:
    """If the answer is still to be read, follow it to its end and return True."""
    if is_raw(answer):
        if not exchange.streamed:
            return False
        answer = answer.parse()  # only builds the stream; the program's own parse() returns this very object
    if type(answer) is dict or hasattr(answer, "__pydantic_extra__"):
        return False  # a whole answer: asking openai's models for what they lack would take long
    http = getattr(answer, "response", None)
    if http is not None and hasattr(answer, "_iterator"):
        _follow_stream(exchange, answer, http)
        return True
    http = getattr(answer, "http_response", None)
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
        self.next_piece = getattr(pieces, "__anext__", None) or pieces.__next__

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


def _take_event(exchange: Exchange, spoken: Spoken | None, piece: Any) -> bool:
    # This runs for every piece of every stream: no step of it that the piece at hand does not need, and few calls.
    known = piece if type(piece) is dict else getattr(piece, "__dict__", _NOTHING)
    if spoken is not None:
        spoken.add(known)
    choices = known.get("choices")
    if choices:
        choice = choices[0]
        choice = choice if type(choice) is dict else choice.__dict__
        delta = choice.get("delta")
        if delta is None:
            generated = bool(choice.get("text"))
        else:
            made = delta if type(delta) is dict else delta.__dict__
            # What openai's models do not know counts as well: servers stream reasoning under several names.
            generated = bool(made.get("content") or made.get("tool_calls") or extras(delta))
        exchange.received(answer=True, generated=generated)
        if exchange.chunks <= 1:
            note_identity(exchange, known)
    elif choices is None:
        _take_response_event(exchange, known)
    else:
        exchange.received(answer=False)
    usage = known.get("usage")
    if usage is not None:
        note_usage(exchange, usage)
    extra = extras(piece)
    if extra:
        note_timings(exchange, extra)
    return usage is not None and not choices and exchange.hides_usage


def _take_response_event(exchange: Exchange, known: dict[str, Any]) -> None:
    """An event of the responses API: a piece of the answer, or the answer so far."""
    generated = (known.get("type") or "").endswith(".delta")
    exchange.received(answer=generated, generated=generated)
    whole = known.get("response")
    if whole is not None:
        describe(exchange, whole)


class _Reader(_Followed):
    """Takes the place of the iterator inside a Stream."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while True:
            self.reading = True
            try:
                piece = self.next_piece()
            except StopIteration:
                self.done()
                raise
            except BaseException as error:
                self.failed(error)
                raise
            finally:
                self.reading = False
            try:
                if self.take(piece):
                    continue
            except Exception as error:  # noqa: BLE001 - whatever goes wrong in capture must not reach the program
                tell(_TAKING, error)
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
                piece = await self.next_piece()
            except StopAsyncIteration:
                self.done()
                raise
            except BaseException as error:
                self.failed(error)
                raise
            finally:
                self.reading = False
            try:
                if self.take(piece):
                    continue
            except Exception as error:  # noqa: BLE001 - whatever goes wrong in capture must not reach the program
                tell(_TAKING, error)
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
