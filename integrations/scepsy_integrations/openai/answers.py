"""What an answer of an OpenAI-compatible server tells, whole or in pieces, and when it was complete."""

from __future__ import annotations

import functools
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, Final

from scepsy import semconv
from scepsy.capture import Exchange, harmless

_READ_LIMIT_BYTES: Final = 1 << 20
"""How much of a body that the program reads as bytes is kept to look for its usage."""


@harmless
def describe(exchange: Exchange, answer: Any) -> None:
    """Note model, id, tokens and server timings of a complete answer, or of a piece that carries them."""
    if _is_raw(answer):
        answer = answer.parse()
    _note_identity(exchange, answer)
    usage = _get(answer, "usage")
    if usage is not None:
        note_usage(exchange, usage)
    extra = answer if isinstance(answer, Mapping) else getattr(answer, "model_extra", None)
    if extra:
        _note_timings(exchange, extra)


def note_usage(exchange: Exchange, usage: Any) -> None:
    """Note tokens, in the words of the chat and completions APIs or in those of the responses API."""
    given = _first(usage, "prompt_tokens", "input_tokens")
    made = _first(usage, "completion_tokens", "output_tokens")
    if given is None and made is None:
        return
    exchange.note(semconv.INPUT_TOKENS, given)
    exchange.note(semconv.OUTPUT_TOKENS, made or 0)
    given_details = _first(usage, "prompt_tokens_details", "input_tokens_details")
    made_details = _first(usage, "completion_tokens_details", "output_tokens_details")
    exchange.note(semconv.CACHED_TOKENS, _get(given_details, "cached_tokens"))
    exchange.note(semconv.REASONING_TOKENS, _get(made_details, "reasoning_tokens"))


def _note_identity(exchange: Exchange, answer: Any) -> None:
    model, name = _get(answer, "model"), _get(answer, "id")
    if isinstance(model, str):
        exchange.note(semconv.RESPONSE_MODEL, model)
    if isinstance(name, str):
        exchange.note(semconv.RESPONSE_ID, name)


def _note_timings(exchange: Exchange, extra: Mapping[str, Any]) -> None:
    metrics = extra.get("metrics")
    if isinstance(metrics, Mapping):  # vLLM, with --enable-per-request-metrics
        queue_ms = metrics.get("queue_time_ms")
        if queue_ms is not None:
            exchange.note(semconv.QUEUE_S, queue_ms / 1e3)
        spent = [metrics.get("time_to_first_token_ms"), metrics.get("generation_time_ms")]
        known = [float(value) for value in spent if value is not None]
        if known:
            exchange.note(semconv.EXECUTION_S, sum(known) / 1e3)
    timings = extra.get("timings")
    if isinstance(timings, Mapping) and "predicted_ms" in timings:  # llama.cpp
        exchange.note(semconv.EXECUTION_S, (timings.get("prompt_ms", 0.0) + timings["predicted_ms"]) / 1e3)


def watch(exchange: Exchange, answer: Any) -> bool:
    """If the answer is still to be read, follow it to its end and return True."""
    if _is_raw(answer):
        if not exchange.streamed:
            return False
        answer = answer.parse()  # only builds the stream; the program's own parse() returns this very object
    http = getattr(answer, "response", None)
    if http is not None and hasattr(answer, "_iterator"):
        _follow_stream(exchange, answer, http)
        return True
    http = getattr(answer, "http_response", None)
    if http is not None and not http.is_closed:
        _follow_bytes(exchange, http)
        return True
    return False


def _is_raw(answer: Any) -> bool:
    """Whether it is what `with_raw_response` returns: the body is there, not yet parsed."""
    return type(answer).__name__ == "LegacyAPIResponse"


def _follow_stream(exchange: Exchange, stream: Any, http: Any) -> None:
    exchange.received(answer=False)
    reader = (_AsyncReader if hasattr(stream, "__anext__") else _Reader)(exchange, stream._iterator)  # noqa: SLF001 - the public ways (subclass, proxy) change the type that the program gets
    stream._iterator = reader  # noqa: SLF001 - as above
    _on_close(http, reader.closed)


class _Followed:
    """Common to the readers below: what a piece, an end and a failure mean."""

    def __init__(
        self,
        exchange: Exchange,
        pieces: Any,
        *,
        take: Callable[[Any], None] | None = None,
        before_end: Callable[[], None] | None = None,
    ) -> None:
        self.exchange = exchange
        self.pieces = pieces
        self.take = functools.partial(_take_event, exchange) if take is None else take
        self.before_end = before_end
        self.reading = False

    @harmless
    def piece(self, piece: Any) -> None:
        """Take note of a piece of the answer."""
        self.take(piece)

    @harmless
    def done(self) -> None:
        """The answer is complete."""
        if self.before_end is not None:
            self.before_end()
        self.exchange.succeed()

    @harmless
    def failed(self, error: BaseException) -> None:
        """Reading it failed."""
        self.exchange.fail(error)

    @harmless
    def closed(self) -> None:
        """The response was closed: by the stream itself at its end, or by the program before that."""
        if self.reading or self.exchange.end_ns is not None:
            return
        if self.before_end is not None:
            self.before_end()
        self.exchange.abandon()

    def __del__(self) -> None:
        self.closed()


def _take_event(exchange: Exchange, piece: Any) -> None:
    choices = getattr(piece, "choices", None)
    if choices is not None:
        exchange.received(answer=bool(choices), generated=bool(choices) and _generates(choices[0]))
        if exchange.chunks <= 1:
            _note_identity(exchange, piece)
        if piece.usage is not None:
            note_usage(exchange, piece.usage)
        if piece.model_extra:
            _note_timings(exchange, piece.model_extra)
        return
    generated = getattr(piece, "type", "").endswith(".delta")  # an event of the responses API
    exchange.received(answer=generated, generated=generated)
    whole = getattr(piece, "response", None)
    if whole is not None:
        describe(exchange, whole)


class _Reader(_Followed):
    """Takes the place of the iterator inside a Stream."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
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
        self.piece(piece)
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
        self.piece(piece)
        return piece

    async def aclose(self) -> None:
        """As async generators have it."""
        await self.pieces.aclose()
        self.closed()


def _generates(choice: Any) -> bool:
    delta = getattr(choice, "delta", None)
    if delta is None:
        return bool(getattr(choice, "text", None))
    return bool(delta.content or delta.tool_calls or delta.model_extra)


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
        self.current = kind(self.exchange, pieces, take=self.take, before_end=self.describe)
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
    if body.startswith(b"data:") or b"\ndata:" in body:
        for line in body.splitlines():
            if line.startswith(b"data: {") and (b'"usage"' in line or b'"metrics"' in line):
                event = json.loads(line[5:])
                describe(exchange, event.get("response", event))
    elif body.startswith(b"{"):
        describe(exchange, json.loads(body))


def _get(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def _first(value: Any, *names: str) -> Any:
    for name in names:
        found = _get(value, name)
        if found is not None:
            return found
    return None
