"""Forwards HTTP requests and answers byte for byte: the core of the gateway and of the recording proxy.

Bodies are never parsed here, headers are passed on except those that speak of one connection only, and every piece of
an answer is passed on when it comes.
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import aiohttp
from aiohttp import web
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

# RFC 9110, 7.6.1, and those of RFC 2616 that are still seen.
HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# A header line may be this long: agents pass on large `baggage` and cookies.
MAX_HEADER_BYTES: Final = 1 << 17
MAX_BODY_BYTES: Final = 1 << 30
# Shorter than what servers keep (vLLM: 5 s), so that a connection is seldom used when it is being closed.
_KEEP_ALIVE_S: Final = 3.0
_CONNECT_S: Final = 5.0

# What is larger is written in pieces, so that others get their turn in between.
_PIECEWISE_BYTES: Final = 1 << 20


class NotConnectedError(Exception):
    """The server could not be reached: nothing of the request was sent."""


class NoAnswerError(Exception):
    """The server closed the connection before the first byte of an answer."""


class BrokenOffError(Exception):
    """The server ended in the middle of an answer."""


@asynccontextmanager
async def client() -> AsyncIterator[aiohttp.ClientSession]:
    """The session that all requests go through: it adds nothing and changes nothing."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
    async with aiohttp.ClientSession(
        connector=connector,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        max_line_size=MAX_HEADER_BYTES,
        max_field_size=MAX_HEADER_BYTES,
    ) as session:
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


def end_to_end(headers: CIMultiDict[str] | CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """The headers without those of the connection."""
    named = {token.strip().lower() for value in headers.getall("Connection", ()) for token in value.split(",")}
    return CIMultiDict(
        (name, value) for name, value in headers.items() if (low := name.lower()) not in HOP_BY_HOP and low not in named
    )


@asynccontextmanager
async def exchange(
    session: aiohttp.ClientSession,
    request: web.Request,
    body: bytes,
    url: str,
    extra: Mapping[str, str] | None = None,
    withheld: Collection[str] = (),
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Send the request to the server at `url` (without a path); `extra` replaces headers, `withheld` are left out.

    Raises NotConnectedError or NoAnswerError: in both cases another server may be tried.
    """
    headers = end_to_end(request.headers)
    for name in ("Expect", *withheld):
        headers.popall(name, None)
    if extra:
        headers.update(extra)
    # aiohttp counts the length anew, of an empty body only if there is one.
    payload: bytes | io.BytesIO | None = body if body or "Content-Length" in headers else None
    headers.popall("Content-Length", None)
    if len(body) > _PIECEWISE_BYTES:
        payload = io.BytesIO(body)
    try:
        answer = await session.request(
            request.method,
            URL(url + request.raw_path, encoded=True),
            headers=headers,
            data=payload,
            allow_redirects=False,
        )
    except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
        raise NotConnectedError(str(error)) from error
    except (aiohttp.ServerDisconnectedError, ConnectionError, aiohttp.ClientOSError) as error:
        raise NoAnswerError(str(error)) from error
    async with answer:
        yield answer


async def relay(
    request: web.Request,
    answer: aiohttp.ClientResponse,
    *,
    extra: Mapping[str, str] | None = None,
    on_chunk: Callable[[bytes], None] | None = None,
) -> web.StreamResponse:
    """Pass the answer on; `extra` adds headers, `on_chunk` sees every piece of the body.

    If the server ends in the middle, so does the connection to the client, which must not take the part for the whole.
    Raises BrokenOffError then, and ConnectionError where the client has gone.
    """
    response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=end_to_end(answer.headers))
    if extra:
        response.headers.update(extra)
    await response.prepare(request)
    while True:
        try:
            chunk = await answer.content.readany()
        except (aiohttp.ClientError, OSError) as error:
            if request.transport is not None:
                request.transport.close()
            raise BrokenOffError(str(error)) from error
        if not chunk:
            break
        if on_chunk is not None:
            on_chunk(chunk)
        await response.write(chunk)
    await response.write_eof()
    return response
