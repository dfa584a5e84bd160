"""Spans of the calls that a proxy carries."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import orjson
from aiohttp import web

from scepsy import semconv
from scepsy.collect.joining import Group, Joiner, Membership, readable
from scepsy.collect.store import FullError, TraceStore
from scepsy.collect.usage import AnswerReader
from scepsy.deployment.upstream import Connection

OPERATIONS: Final = {
    "/v1/chat/completions": semconv.CHAT,
    "/v1/completions": semconv.TEXT_COMPLETION,
    "/v1/responses": semconv.CHAT,
    "/v1/messages": semconv.CHAT,
    "/v1/embeddings": semconv.EMBEDDINGS,
    "/v1/rerank": semconv.RERANK,
    "/v2/rerank": semconv.RERANK,
    "/rerank": semconv.RERANK,
    "/score": semconv.RERANK,
    "/v1/score": semconv.RERANK,
}
SCOPE: Final = "scepsy.collect"

_FLUSH_S: Final = 0.5
_LIMIT: Final = 200_000  # spans waiting to be written, beyond which new ones are dropped and counted
_REMOTE_PARENT: Final = 0x300  # the parent belongs to another process: it may be in other files, or in none
_CLIENT_KIND: Final = 3
_INTERNAL_KIND: Final = 1
_ERROR: Final = 2
_logger = logging.getLogger("scepsy")


class Recorder:
    """Makes spans of calls, joins them into executions and writes them, in `recording`'s block."""

    def __init__(self, store: TraceStore, joiner: Joiner | None = None) -> None:
        self._store = store
        self._joiner = joiner or Joiner()
        self._spans: list[dict[str, Any]] = []
        self._dropped = 0
        self.calls = 0
        self._resource = _attributes(
            {"service.name": SCOPE, "host.name": socket.gethostname(), "process.pid": os.getpid()}
        )

    def begin(self, request: web.Request, content: Mapping[str, Any] | None) -> RecordedCall | None:
        """A request has come; `content` is its parsed body. None if it is not a call of an LLM."""
        operation = OPERATIONS.get(request.path) if request.method == "POST" else None
        if operation is None:
            return None
        now_ns = time.time_ns()
        place = self._joiner.join(request.headers, request.remote or "", now_ns)
        self.calls += 1
        return RecordedCall(self, place, operation, readable(request.host), content or {}, now_ns)

    @contextlib.asynccontextmanager
    async def recording(self) -> AsyncIterator[None]:
        """Writes while the block runs; at its end everything, open executions included."""
        task = asyncio.create_task(self._flush_often())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            self._close_executions(everything=True)
            await self._flush()

    def add(self, place: Membership, span: dict[str, Any], end_ns: int) -> None:
        """A call has ended."""
        self._joiner.leave(place, end_ns)
        self._queue(span)

    def _queue(self, span: dict[str, Any]) -> None:
        if len(self._spans) < _LIMIT:
            self._spans.append(span)
        else:
            self._dropped += 1

    def _close_executions(self, *, everything: bool = False) -> None:
        for group in self._joiner.finished(time.time_ns(), everything=everything):
            self._queue(_root(group))

    async def _flush_often(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_S)
            self._close_executions()
            await self._flush()

    async def _flush(self) -> None:
        if self._dropped:
            _logger.warning("%d spans were dropped: more than %d were waiting to be written", self._dropped, _LIMIT)
            self._dropped = 0
        if not self._spans:
            return
        spans, self._spans = self._spans, []
        scope = {"scope": {"name": SCOPE, "version": ""}, "spans": spans}
        request = {"resourceSpans": [{"resource": {"attributes": self._resource}, "scopeSpans": [scope]}]}
        try:
            await self._store.write(orjson.dumps(request) + b"\n")
        except orjson.JSONEncodeError as error:
            # What one of them was told by its client or engine cannot be written: the others are.
            kept = [span for span in spans if _is_writable(span)]
            _logger.warning("%d spans could not be written: %s", len(spans) - len(kept), error)
            if len(kept) < len(spans):
                self._spans = kept + self._spans
                await self._flush()
        except (OSError, FullError) as error:
            _logger.warning("%d spans could not be written to %s: %s", len(spans), self._store.directory, error)


def _is_writable(span: Mapping[str, Any]) -> bool:
    try:
        orjson.dumps(span)
    except orjson.JSONEncodeError:
        return False
    return True


class RecordedCall:
    """One call on its way through the proxy."""

    __slots__ = (
        "_attributes", "_begin_ns", "_end_ns", "_first_ns", "_id", "_operation", "_place", "_reader", "_recorder",
        "_status",
    )  # fmt: skip

    def __init__(
        self,
        recorder: Recorder,
        place: Membership,
        operation: str,
        host: str,
        content: Mapping[str, Any],
        begin_ns: int,
    ) -> None:
        self._recorder = recorder
        self._place = place
        self._operation = operation
        self._begin_ns = begin_ns
        self._first_ns: int | None = None
        self._end_ns: int | None = None
        self._reader: AnswerReader | None = None
        self._status = 0
        self._id = secrets.token_hex(8)
        # Marked as the carrier of a call: under a client's own span of the call it is detail, alone it is the call.
        attributes: dict[str, str | int | float | bool] = {
            semconv.KIND: semconv.KIND_LLM,
            semconv.TRANSPORT: True,
            semconv.OPERATION: operation,
            semconv.JOINED_BY: place.joined_by,
        }
        model = content.get("model")
        if isinstance(model, str):
            attributes[semconv.REQUEST_MODEL] = model
        if content.get("stream") is True:
            attributes[semconv.REQUEST_STREAM] = True
        address, _, port = host.rpartition(":")
        if port.isdigit() and address:
            attributes[semconv.SERVER_ADDRESS] = address.strip("[]")
            attributes[semconv.SERVER_PORT] = int(port)
        elif host:
            attributes[semconv.SERVER_ADDRESS] = host
        self._attributes = attributes

    @property
    def headers(self) -> Mapping[str, str]:
        """What the request carries on, so that the engine's own spans lie below this one."""
        return {"traceparent": f"00-{self._place.trace}-{self._id}-{self._place.sampled}"}

    def note(self, key: str, value: str | int) -> None:
        """Add an attribute."""
        self._attributes[key] = value

    def answered(self, answer: Connection) -> None:
        """The head of the answer is here."""
        self._status = answer.status
        if answer.status == 200:
            self._reader = AnswerReader(answer.content_type, answer.header(b"content-encoding").lower())

    def chunk(self, piece: bytes) -> None:
        """A piece of the answer passes by."""
        now_ns = time.time_ns()
        if self._first_ns is None:
            self._first_ns = now_ns
        self._end_ns = now_ns
        if self._reader is not None:
            self._reader.feed(piece)

    def end(self, *, error: str = "", cancelled: bool = False) -> None:
        """It is over: whole, failed with `error`, or left by its client.

        Clients close at the last event of a stream; engines send that before the stream's end.
        """
        cancelled = cancelled and not (self._reader is not None and self._reader.has_ended)
        whole = not error and not cancelled
        end_ns = self._end_ns if whole and self._end_ns is not None else time.time_ns()
        attributes = self._attributes
        if cancelled:
            attributes[semconv.OUTCOME] = "cancelled"
        if whole and self._status >= 400:
            error = str(self._status)
        if error:
            attributes[semconv.ERROR_TYPE] = error
        if self._reader is not None:
            self._describe(self._reader)
        span = _span(self._place.trace, self._id, self._place.parent, self._name(), self._begin_ns, end_ns, attributes)
        span["kind"] = _CLIENT_KIND
        span["flags"] = _REMOTE_PARENT | int(self._place.sampled, 16)
        if error or cancelled:
            span["status"] = {"code": _ERROR}
        self._recorder.add(self._place, span, end_ns)

    def _name(self) -> str:
        return f"{self._operation} {self._attributes.get(semconv.REQUEST_MODEL, '')}".rstrip()

    def _describe(self, reader: AnswerReader) -> None:
        usage = reader.usage()
        told = {
            semconv.RESPONSE_ID: usage.id,
            semconv.RESPONSE_MODEL: usage.model,
            semconv.INPUT_TOKENS: usage.input_tokens,
            semconv.OUTPUT_TOKENS: usage.output_tokens,
            semconv.CACHED_TOKENS: usage.cached_tokens,
            semconv.OUTPUT_CHUNKS: usage.pieces,
        }
        self._attributes.update({key: value for key, value in told.items() if value is not None})
        if usage.pieces is not None and self._first_ns is not None:
            self._attributes[semconv.TIME_TO_FIRST_CHUNK_S] = (self._first_ns - self._begin_ns) / 1e9


def _root(group: Group) -> dict[str, Any]:
    name = group.workflow or "unnamed"
    attributes: dict[str, str | int | float | bool] = {
        semconv.KIND: semconv.KIND_WORKFLOW,
        semconv.WORKFLOW_NAME: name,
        semconv.JOINED_BY: group.joined_by,
    }
    span = _span(group.trace, group.root, "", name, group.start_ns, group.end_ns, attributes)
    span["kind"] = _INTERNAL_KIND
    return span


def _span(
    trace: str,
    own: str,
    parent: str,
    name: str,
    start_ns: int,
    end_ns: int,
    attributes: Mapping[str, str | int | float | bool],
) -> dict[str, Any]:
    span: dict[str, Any] = {
        "traceId": trace,
        "spanId": own,
        "name": name,
        "startTimeUnixNano": str(start_ns),
        "endTimeUnixNano": str(end_ns),
        "attributes": _attributes(attributes),
    }
    if parent:
        span["parentSpanId"] = parent
    return span


def _attributes(attributes: Mapping[str, str | int | float | bool]) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items()]


def _value(value: str | int | float | bool) -> dict[str, Any]:  # noqa: FBT001 - a value, not a switch
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    return {"doubleValue": value} if isinstance(value, float) else {"stringValue": value}
