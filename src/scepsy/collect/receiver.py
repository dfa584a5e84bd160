"""OTLP over HTTP: what any OpenTelemetry exporter sends, into trace files."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import orjson
from aiohttp import web

from scepsy.collect.otlp import JSON, PROTOBUF, EncodingError, inflate, to_line
from scepsy.collect.store import FullError, TraceStore
from scepsy_optimizer.errors import ScepsyError

RETRY_AFTER_S: Final = 1
_logger = logging.getLogger("scepsy")


class Receiver:
    """Answers `/v1/traces`. A request is acknowledged when its spans are written; until then its sender keeps them."""

    def __init__(self, store: TraceStore, *, keep_content: bool = False) -> None:
        self._store = store
        self._keep_content = keep_content
        self._unkept: set[str] = set()
        self.spans = 0

    def add_routes(self, app: web.Application) -> None:
        """Make the application receive. Metrics and logs, which exporters send along, are accepted and not kept."""
        app.add_routes(
            [
                web.post("/v1/traces", self._traces),
                web.post("/v1/metrics", self._unwanted),
                web.post("/v1/logs", self._unwanted),
            ]
        )

    async def _traces(self, request: web.Request) -> web.Response:
        content_type = request.content_type
        if content_type not in (JSON, PROTOBUF):
            return _answer(415, JSON, f"content type {content_type!r} is not OTLP; send {PROTOBUF} or {JSON}")
        try:
            body = inflate(await request.read(), request.headers.get("Content-Encoding", "").lower())
            line, spans = await asyncio.to_thread(to_line, body, content_type, keep_content=self._keep_content)
        except EncodingError as error:
            return _answer(400, content_type, str(error))
        except ScepsyError as error:
            return _answer(415, content_type, str(error))
        try:
            if spans:
                await self._store.write(line)
        except FullError:
            return _answer(503, content_type, "more spans are waiting to be written than may wait")
        except OSError as error:
            _logger.error("traces cannot be written to %s: %s", self._store.directory, error)  # noqa: TRY400 - no bug
            return _answer(503, content_type, f"traces cannot be written: {error.strerror}")
        self.spans += spans
        return _answer(200, content_type, "")

    async def _unwanted(self, request: web.Request) -> web.Response:
        await request.read()
        if request.path not in self._unkept:
            self._unkept.add(request.path)
            _logger.info("%s: accepted, not kept", request.path)
        return _answer(200, request.content_type, "")


def _answer(status: int, content_type: str, message: str) -> web.Response:
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    if content_type == PROTOBUF:
        # google.rpc.Status with its message in field 2; an empty message is also an empty response.
        text = message.encode()
        body = b"\x12" + _varint(len(text)) + text if text else b""
        return web.Response(status=status, body=body, headers=headers, content_type=PROTOBUF)
    body = orjson.dumps({"message": message} if message else {})
    return web.Response(status=status, body=body, headers=headers, content_type=JSON)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes((*encoded, number))
