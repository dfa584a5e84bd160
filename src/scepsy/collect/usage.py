"""What an answer that passes by says of itself: id, model and token counts, from as little of it as will do."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

_KEPT_BYTES: Final = 1 << 20
_EVENT_END: Final = re.compile(rb"\r?\n\r?\n")
_USAGE: Final = re.compile(rb'(?<!\\)"usage"\s*:\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
_LAST_EVENTS: Final = 3
_LAST_TYPES: Final = frozenset({"response.completed", "response.incomplete", "message_stop"})
"""With what a stream of the responses API ends, and one of messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Counts and names of an answer; None where it does not tell. `pieces` is the number of events with content."""

    id: str | None = None
    model: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None
    pieces: int | None = None


class AnswerReader:
    """Sees an answer piece by piece and keeps its beginning and its end only."""

    __slots__ = ("_encoding", "_events", "_first", "_last", "_size", "_stream", "_tail")

    def __init__(self, content_type: str, encoding: str) -> None:
        self._stream = content_type == "text/event-stream"
        self._encoding = encoding
        self._tail = bytearray()
        self._size = 0
        self._events = 0
        self._first: bytes = b""
        self._last: list[bytes] = []

    def feed(self, chunk: bytes) -> None:
        """The next piece."""
        self._tail += chunk
        self._size += len(chunk)
        if self._stream and not self._encoding:
            *whole, rest = _EVENT_END.split(self._tail)
            if whole:
                self._events += len(whole)
                self._first = self._first or bytes(whole[0])
                self._last = [*self._last, *(bytes(event) for event in whole[-_LAST_EVENTS:])][-_LAST_EVENTS:]
                self._tail = bytearray(rest)
        if len(self._tail) > _KEPT_BYTES:
            self._first = self._first or bytes(self._tail[:4096])
            del self._tail[:-4096]

    @property
    def has_ended(self) -> bool:
        """Whether a stream has come to its last event, after which nothing follows but its end."""
        if not self._last or self._tail.strip():
            return False
        last = self._last[-1]
        return last.endswith(b"[DONE]") or _data(last).get("type") in _LAST_TYPES

    def usage(self) -> Usage:
        """What the answer has told, once it is over."""
        if self._stream and not self._encoding:
            return self._of_stream()
        body = bytes(self._tail)
        if self._encoding == "gzip" and self._size == len(body):
            try:
                body = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(body, _KEPT_BYTES)
            except zlib.error:
                return Usage()
        elif self._encoding not in ("", "identity"):
            return Usage()
        if self._size == len(self._tail):
            return _of(_parse(body))
        # Too large to have been kept: the counts stand at its end.
        found = _USAGE.findall(body)
        return _of({"usage": _parse(found[-1])}) if found else Usage()

    def _of_stream(self) -> Usage:
        first = _data(self._first)
        told = _of(first)
        pieces = self._events
        for event in self._last:
            if event.endswith(b"[DONE]"):
                pieces -= 1
                continue
            content = _data(event)
            if not content.get("choices", True) and content.get("usage"):
                pieces -= 1
            told = _merged(told, _of(content))
        if _opens_only(first):
            pieces -= 1
        return Usage(
            id=told.id,
            model=told.model,
            input_tokens=told.input_tokens,
            output_tokens=told.output_tokens,
            cached_tokens=told.cached_tokens,
            pieces=max(0, pieces),
        )


def _opens_only(first: Mapping[str, Any]) -> bool:
    """Whether the first event of a chat says who speaks and nothing more."""
    choices = first.get("choices")
    if not (isinstance(choices, list) and choices and isinstance(choices[0], dict)):
        return False
    delta = choices[0].get("delta")
    return isinstance(delta, dict) and "role" in delta and not delta.get("content")


def _data(event: bytes) -> Mapping[str, Any]:
    return _parse(b"".join(line[5:].strip() for line in event.splitlines() if line.startswith(b"data:")))


def _parse(text: bytes) -> Mapping[str, Any]:
    try:
        content = orjson.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _of(content: Mapping[str, Any]) -> Usage:
    """From a chat completion, a completion, embeddings, a response of the responses API, or a message."""
    found = Usage()
    for holder in _holders(content):
        usage = holder.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
        cached = details.get("cached_tokens") if isinstance(details, dict) else usage.get("cache_read_input_tokens")
        one = Usage(
            id=_text(holder.get("id")),
            model=_text(holder.get("model")),
            input_tokens=_count(usage.get("prompt_tokens", usage.get("input_tokens"))),
            output_tokens=_count(usage.get("completion_tokens", usage.get("output_tokens"))),
            cached_tokens=_count(cached),
        )
        found = _merged(found, one)
    return found


def _holders(content: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield content
    for name in ("response", "message"):
        inner = content.get(name)
        if isinstance(inner, dict):
            yield inner


def _merged(one: Usage, other: Usage) -> Usage:
    """What either tells; of both, the later."""
    return Usage(
        id=one.id or other.id,
        model=one.model or other.model,
        input_tokens=other.input_tokens if other.input_tokens is not None else one.input_tokens,
        output_tokens=other.output_tokens if other.output_tokens is not None else one.output_tokens,
        cached_tokens=other.cached_tokens if other.cached_tokens is not None else one.cached_tokens,
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
