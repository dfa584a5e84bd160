"""Forwards HTTP requests and answers byte for byte: the core of the gateway and of the recording proxy.

Bodies are never parsed here, headers are passed on except those that speak of one connection only, and every piece of
an answer is passed on when it comes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp
from aiohttp import HttpVersion11, web

from scepsy.deployment.connections import CONNECT_S, Connections, place_of
from scepsy.deployment.upstream import BrokenOffError, Connection

# RFC 9110, 7.6.1, and those of RFC 2616 that are still seen.
HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# A header line may be this long: agents pass on large `baggage` and cookies.
MAX_HEADER_BYTES: Final = 1 << 17
MAX_BODY_BYTES: Final = 1 << 30
# Beyond this a client is slower than its engine, which is then read no faster than the client reads.
_CONGESTED_BYTES: Final = 1 << 16
_STREAM: Final = "text/event-stream"


@asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """A session in which engines are asked how they are."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), timeout=timeout) as session:
        yield session


def server_options() -> dict[str, Any]:
    """Arguments of `aiohttp.web.AppRunner` for a server that forwards."""
    return {
        "access_log": None,
        "auto_decompress": False,
        "handler_cancellation": True,
        "max_line_size": MAX_HEADER_BYTES,
        "max_field_size": MAX_HEADER_BYTES,
    }


def end_to_end(headers: Sequence[tuple[bytes, bytes]], but: Collection[bytes] = ()) -> list[tuple[bytes, bytes]]:
    """The headers without those of the connection, and without those named in `but`, which are in small letters."""
    kept = [(name, value) for name, value in headers if (low := name.lower()) not in HOP_BY_HOP and low not in but]
    named = {
        token.strip().lower() for name, value in headers if name.lower() == b"connection" for token in value.split(b",")
    }
    return [pair for pair in kept if pair[0].lower() not in named] if named else kept


@asynccontextmanager
async def exchange(
    connections: Connections,
    request: web.Request,
    body: bytes,
    url: str,
    extra: Mapping[str, str] | None = None,
    withheld: Collection[bytes] = (),
) -> AsyncIterator[Connection]:
    """Send the request to the server at `url` (without a path); gives the connection when the answer's head is there.

    With a stream of events, when the first of them is: vLLM says that it will stream before it has begun with the
    request, and what it has not begun another server can still answer.

    `extra` replaces headers, `withheld`, in small letters, are left out. Raises NotConnectedError or NoAnswerError: in
    both cases another server may be tried.
    """
    place = place_of(url)
    added = {name.lower().encode(): value.encode() for name, value in extra.items()} if extra else {}
    headers = end_to_end(request.raw_headers, (b"expect", b"content-length", *withheld, *added))
    if request.version < HttpVersion11 and "Host" not in request.headers:
        added.setdefault(b"host", place.authority)
    lines = [
        request.method.encode() + b" " + place.prefix + request.raw_path.encode(errors="surrogateescape") + b" HTTP/1.1"
    ]
    lines += [name + b": " + value for name, value in headers]
    lines += [name + b": " + value for name, value in added.items()]
    # Counted anew, because a body in chunks says no length; of an empty body only if there is one.
    if body or request.body_exists:
        lines.append(b"Content-Length: %d" % len(body))
    connection = await connections.get(place)
    try:
        await connection.ask(b"\r\n".join(lines) + b"\r\n\r\n", body, is_bodiless=request.method == "HEAD")
        if connection.content_type == _STREAM:
            await connection.first_piece()
        yield connection
    except BaseException:
        connection.abort()
        raise
    connections.keep(place, connection)


class _Sent(web.StreamResponse):
    """An answer that has been written already."""

    def __init__(self, status: int, *, keep_alive: bool) -> None:
        super().__init__(status=status)
        self._is_kept = keep_alive

    @property
    def keep_alive(self) -> bool:
        return self._is_kept

    async def prepare(self, _request: web.BaseRequest) -> None:
        pass

    async def write_eof(self, _data: bytes = b"") -> None:
        pass


async def relay(
    request: web.Request,
    answer: Connection,
    *,
    extra: Mapping[str, str] | None = None,
    on_chunk: Callable[[bytes], None] | None = None,
) -> web.StreamResponse:
    """Pass the answer on; `extra` adds headers, `on_chunk` sees every piece of the body.

    If the server ends in the middle, so does the connection to the client, which must not take the part for the whole.
    Raises BrokenOffError then, and ConnectionError where the client has gone.
    """
    transport = request.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the client has gone")
    is_new = request.version >= HttpVersion11
    is_bodiless = request.method == "HEAD" or answer.status in (204, 304)
    is_chunked = is_new and not is_bodiless and not answer.has_length
    # To those who know no chunks the end is told by the close.
    keep_alive = request.keep_alive and (is_new or is_bodiless or answer.has_length)
    head = _head(answer, extra, is_chunked=is_chunked, connection=_connection(keep_alive=keep_alive, is_new=is_new))

    def write(piece: bytes) -> None:
        if on_chunk is not None:
            on_chunk(piece)
        if transport.is_closing():
            return
        transport.write(b"%x\r\n%b\r\n" % (len(piece), piece) if is_chunked else piece)
        if transport.get_write_buffer_size() > _CONGESTED_BYTES:
            answer.pause()

    first = answer.take()
    if first and on_chunk is not None:
        on_chunk(first)
    transport.write(head + (b"%x\r\n%b\r\n" % (len(first), first) if first and is_chunked else first))
    answer.pass_to(write)
    while not answer.is_over:
        await answer.wait()
        if not answer.is_over:
            await request.writer.drain()
            answer.resume()
    if answer.error is not None:
        if is_chunked or answer.has_length:
            transport.close()
        else:
            # A close would be taken for the end.
            transport.abort()
        raise BrokenOffError(answer.error)
    if is_chunked and not transport.is_closing():
        transport.write(b"0\r\n\r\n")
    return _Sent(answer.status, keep_alive=keep_alive)


def _head(answer: Connection, extra: Mapping[str, str] | None, *, is_chunked: bool, connection: bytes) -> bytes:
    lines = [b"HTTP/1.1 %d %b" % (answer.status, answer.reason)]
    lines += [name + b": " + value for name, value in end_to_end(answer.headers)]
    lines += [f"{name}: {value}".encode() for name, value in extra.items()] if extra else []
    lines += [b"Transfer-Encoding: chunked"] if is_chunked else []
    return b"\r\n".join(lines) + connection + b"\r\n\r\n"


def _connection(*, keep_alive: bool, is_new: bool) -> bytes:
    """What each side takes for granted is not said."""
    if keep_alive == is_new:
        return b""
    return b"\r\nConnection: keep-alive" if keep_alive else b"\r\nConnection: close"
