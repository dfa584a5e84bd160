"""A server and a client with next to nothing in them, for what stands between: bare protocols on uvloop.

The server answers as an engine would, but at once; streams have as many pieces as `max_tokens` says, one every so many
milliseconds as `user` says: fields that every router passes on. As an echo it says what it received instead.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from multiprocessing.connection import Connection
from typing import Any, Final

import uvloop

MODEL: Final = "m"
ANSWER: Final = json.dumps(
    {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "ok"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
    }
).encode()
MODELS: Final = json.dumps(
    {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "x", "root": MODEL}]}
).encode()
END: Final = b"data: [DONE]\n\n"
LAST_CHUNK: Final = b"0\r\n\r\n"
# With the end of the chunk before: a header may end in a nought.
_STREAM_END: Final = b"\r\n" + LAST_CHUNK
ANSWER_TIMEOUT_S: Final = 60.0


def piece(number: int) -> bytes:
    """One server-sent event; its number says where in the stream it belongs."""
    delta = b'"choices":[{"index":0,"delta":{"content":" word %06d"},"finish_reason":null}]' % number
    return b'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"m",' + delta + b"}\n\n"


def whole(pieces: int) -> bytes:
    """All that a stream of so many pieces says."""
    return b"".join(map(piece, range(pieces))) + END


class Server(asyncio.Protocol):
    """One connection of the server."""

    is_echo = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client is here."""
        self.transport: Any = transport
        self.received = bytearray()

    def data_received(self, data: bytes) -> None:
        """Answer what is complete."""
        self.received += data
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self.received[:end])
        before, name, after = head.lower().partition(b"content-length:")
        length = int(after.split(b"\r\n")[0]) if name else 0
        if not name and b"transfer-encoding: chunked" in before:
            # Only the echo is sent such, and small: whole when its last chunk is here.
            if not self.received.endswith(LAST_CHUNK):
                return
            body = unchunked(bytes(self.received[end + 4 :]))
        elif len(self.received) < end + 4 + length:
            return
        else:
            body = bytes(self.received[end + 4 : end + 4 + length])
        self.received.clear()
        self.answer(head, body)

    def answer(self, head: bytes, body: bytes) -> None:
        """By what is asked for."""
        if head.startswith(b"GET"):
            self.reply(MODELS if b" /v1/models " in head else b"{}")
        elif self.is_echo:
            said = {"head": head.decode("latin-1"), "body": base64.b64encode(body).decode()}
            self.reply(json.dumps(said).encode())
        elif b'"stream":true' in body or b'"stream": true' in body:
            asked = json.loads(body)
            self.task = asyncio.ensure_future(self.stream(asked["max_tokens"], int(asked["user"]) / 1000))
        else:
            self.reply(ANSWER)

    def reply(self, body: bytes) -> None:
        """An answer as a whole."""
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)

    async def stream(self, pieces: int, every_s: float) -> None:
        """An answer piece by piece."""
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for number in range(pieces):
            said = piece(number)
            self.transport.write(b"%x\r\n%s\r\n" % (len(said), said))
            if self.transport.is_closing():
                return
            await asyncio.sleep(every_s)
        self.transport.write(b"%x\r\n%s\r\n" % (len(END), END) + LAST_CHUNK)


class Echo(Server):
    """One connection of the server that says what it received."""

    is_echo = True


def run_server(told: Connection, *, is_echo: bool = False) -> None:
    """The process behind the routers."""

    async def main() -> None:
        server = await asyncio.get_running_loop().create_server(
            Echo if is_echo else Server, "127.0.0.1", 0, backlog=4096
        )
        told.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    uvloop.run(main())


def run_echo(told: Connection) -> None:
    """The process that says what it received."""
    run_server(told, is_echo=True)


def request(size: int, **fields: object) -> bytes:
    """A chat request as clients send them, with so many bytes of prompt."""
    messages = [{"role": "user", "content": "x" * size}]
    body = json.dumps({"model": MODEL, "messages": messages, "max_tokens": 9, **fields}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


class _Asker(asyncio.Protocol):
    """Asks again as soon as it is answered, so many times."""

    def __init__(self, sent: bytes, times: int, latencies: list[float], done: asyncio.Future[None]) -> None:
        self.sent, self.left, self.latencies, self.done = sent, times, latencies, done
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.ask()

    def ask(self) -> None:
        self.begun_s = time.perf_counter()
        self.transport.write(self.sent)

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.received.endswith(ANSWER):
            return
        self.latencies.append(time.perf_counter() - self.begun_s)
        if not self.received.startswith(b"HTTP/1.1 200"):
            raise ValueError(self.received)
        self.received = b""
        self.left -= 1
        if self.left:
            self.ask()
        else:
            self.transport.close()

    def connection_lost(self, _error: Exception | None) -> None:
        if self.done.done():
            return
        if self.left:
            self.done.set_exception(ConnectionError(f"{self.left} requests were not answered: {self.received[:300]!r}"))
        else:
            self.done.set_result(None)


async def ask(port: int, sent: bytes, clients: int, requests: int) -> list[float]:
    """Send the request again and again from each client; returns all latencies in seconds."""
    loop = asyncio.get_running_loop()
    latencies: list[float] = []
    done = [loop.create_future() for _ in range(clients)]
    for one in done:
        await loop.create_connection(
            lambda one=one: _Asker(sent, requests // clients, latencies, one),  # type: ignore[misc]
            "127.0.0.1",
            port,
        )
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        await asyncio.gather(*done)
    return latencies


class _Follower(asyncio.Protocol):
    """Reads one stream to its end."""

    def __init__(self, sent: bytes, done: asyncio.Future[bytes]) -> None:
        self.sent, self.done = sent, done
        self.parts: list[bytes] = []
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.transport.write(self.sent)

    def data_received(self, data: bytes) -> None:
        self.parts.append(data)
        # The end may come in two parts; it is short.
        if (data if len(data) > len(_STREAM_END) else b"".join(self.parts[-4:])).endswith(_STREAM_END):
            self.transport.close()

    def connection_lost(self, _error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(b"".join(self.parts))


async def follow(port: int, streams: int, pieces: int, every_ms: int) -> tuple[int, float]:
    """Read so many streams at once; returns how many pieces are lost or not as they were sent, and the seconds."""
    loop = asyncio.get_running_loop()
    sent = request(1000, stream=True, max_tokens=pieces, user=str(every_ms))
    done: list[asyncio.Future[bytes]] = [loop.create_future() for _ in range(streams)]
    begun_s = time.perf_counter()

    async def one(future: asyncio.Future[bytes]) -> None:
        await loop.create_connection(lambda: _Follower(sent, future), "127.0.0.1", port)

    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        await asyncio.gather(*map(one, done))
        answers = await asyncio.gather(*done)
    spent_s = time.perf_counter() - begun_s
    expected = whole(pieces)
    return sum(_lost(answer, expected) for answer in answers), spent_s


def _lost(answer: bytes, expected: bytes) -> int:
    said = unchunked(answer.partition(b"\r\n\r\n")[2])
    if said == expected:
        return 0
    events = expected.split(b"\n\n")
    return max(1, sum(event not in said for event in events))


def unchunked(data: bytes) -> bytes:
    """A body in chunks as a whole, as far as it came."""
    parts, place = [], 0
    while (end := data.find(b"\r\n", place)) >= 0:
        length = int(data[place:end].split(b";")[0] or b"0", 16)
        if not length:
            break
        parts.append(data[end + 2 : end + 2 + length])
        place = end + 4 + length
    return b"".join(parts)
