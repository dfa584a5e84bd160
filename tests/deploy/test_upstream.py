"""Servers that speak HTTP in every way that there is, and in some that are none, behind what forwards."""

import asyncio
import contextlib
import socket

import pytest
from aiohttp import web

from scepsy.deployment.connections import Connections, connections, place_of
from scepsy.deployment.forward import MAX_BODY_BYTES, exchange, relay, server_options
from scepsy.deployment.upstream import BrokenOffError, NoAnswerError, NotConnectedError

CLOSE, RESET = "close", "reset"


class Script:
    """Answers each request with the next list of bytes, one after another."""

    def __init__(self):
        self.answers = []
        self.writers = []
        self.connected = 0
        self.serve_one = None

    async def serve(self, reader, writer):
        self.connected += 1
        self.writers.append(writer)
        if self.serve_one is not None:
            return await self.serve_one(reader, writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(length or 0))
                for part in self.answers.pop(0):
                    if part == RESET:
                        # Nothing lingers: whoever reads is told of an error.
                        option = (socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                        writer.get_extra_info("socket").setsockopt(*option)
                    if part in (CLOSE, RESET):
                        return writer.close()
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.01)
        return writer.close()

    async def end(self):
        for writer in self.writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


class Way:
    """From a raw client through what forwards to the script."""

    def __init__(self, script, port, errors):
        self.script, self.port, self.errors = script, port, errors

    async def ask(self, answer, *, method="POST", version="1.1", headers="", keep=False):
        """All that the client gets to the end of the connection, or, to `keep` it, until nothing comes for a while."""
        self.script.answers.append(answer)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        body = "" if method == "HEAD" else "Content-Length: 2\r\n"
        close = "" if keep or version == "1.0" else "Connection: close\r\n"
        writer.write(
            f"{method} /x HTTP/{version}\r\nHost: h\r\n{body}{close}{headers}\r\n".encode() + (b"{}" if body else b"")
        )
        got = b""
        with contextlib.suppress(TimeoutError, ConnectionError):
            async with asyncio.timeout(0.3 if keep else 5):
                while part := await reader.read(1 << 16):
                    got += part
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return got


@pytest.fixture
async def way():
    script, errors = Script(), []
    async with contextlib.AsyncExitStack() as stack:
        server = await stack.enter_async_context(await asyncio.start_server(script.serve, "127.0.0.1", 0))
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        stack.push_async_callback(script.end)
        engines = await stack.enter_async_context(connections())

        async def forward(request):
            try:
                async with exchange(engines, request, await request.read(), url) as answer:
                    return await relay(request, answer)
            except (BrokenOffError, NoAnswerError, NotConnectedError) as error:
                errors.append(type(error))
                return web.Response(status=502)

        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", forward)
        runner = web.AppRunner(app, shutdown_timeout=0.1, **server_options())
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield Way(script, runner.addresses[0][1], errors)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SIZED = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n"
ENDLESS = b"HTTP/1.1 200 OK\r\n\r\n"
CLOSED = b"\r\nConnection: close\r\n\r\n"


ANSWERS = {
    "sized": ([SIZED + b"hello"], {}, SIZED[:-4] + CLOSED + b"hello"),
    "sized, in parts": ([SIZED[:20], SIZED[20:], b"he", b"llo"], {}, SIZED[:-4] + CLOSED + b"hello"),
    "sized, to an old client": ([SIZED + b"hello"], {"version": "1.0"}, SIZED + b"hello"),
    "sized, and kept": (
        [SIZED + b"hello"],
        {"version": "1.0", "headers": "Connection: keep-alive\r\n", "keep": True},
        SIZED[:-4] + b"\r\nConnection: keep-alive\r\n\r\nhello",
    ),
    "chunks pass as they come": (
        [CHUNKED, b"2\r\nhe\r\n", b"3\r\nllo\r\n", b"0\r\n\r\n"],
        {},
        CHUNKED[:-4] + CLOSED + b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    ),
    "chunks that come together": (
        [CHUNKED + b"2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nTrailer: x\r\n\r\n"],
        {},
        CHUNKED[:-4] + CLOSED + b"5\r\nhello\r\n0\r\n\r\n",
    ),
    "chunks, to an old client": (
        [CHUNKED + b"5\r\nhel", b"lo\r\n0\r\n\r\n"],
        {"version": "1.0"},
        b"HTTP/1.1 200 OK\r\n\r\nhello",
    ),
    "until the close": (
        [ENDLESS + b"he", b"llo", CLOSE],
        {},
        CHUNKED[:-4] + CLOSED + b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
    ),
    "until the close, to an old client": ([ENDLESS + b"hello", CLOSE], {"version": "1.0"}, ENDLESS + b"hello"),
    "nothing": ([CHUNKED + b"0\r\n\r\n"], {}, CHUNKED[:-4] + CLOSED + b"0\r\n\r\n"),
    "no content": ([b"HTTP/1.1 204 None\r\n\r\n"], {}, b"HTTP/1.1 204 None" + CLOSED),
    "not modified, with a length": (
        [b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n"],
        {},
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5" + CLOSED,
    ),
    "the head alone": ([SIZED], {"method": "HEAD"}, SIZED[:-4] + CLOSED),
    "words before the answer": (
        [b"HTTP/1.1 100 Continue\r\nX: 1\r\n\r\n", b"HTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + SIZED + b"hello"],
        {},
        SIZED[:-4] + CLOSED + b"hello",
    ),
    "headers twice, empty and odd": (
        [b"HTTP/1.1 299 \r\nx-A: 1\r\nX-a: 2\r\nX-Empty:\r\nX-Odd: \xff\r\nContent-Length: 0\r\n\r\n"],
        {},
        b"HTTP/1.1 299 \r\nx-A: 1\r\nX-a: 2\r\nX-Empty: \r\nX-Odd: \xff\r\nContent-Length: 0" + CLOSED,
    ),
    "an old server": (
        [b"HTTP/1.0 200 OK\r\n\r\nhello", CLOSE],
        {},
        CHUNKED[:-4] + CLOSED + b"5\r\nhello\r\n0\r\n\r\n",
    ),
    "more than was asked for": ([SIZED + b"hello" + SIZED + b"again"], {}, SIZED[:-4] + CLOSED + b"hello"),
}


@pytest.mark.parametrize("name", ANSWERS)
async def test_whole_answers(way, name):
    answer, options, expected = ANSWERS[name]
    assert await way.ask(answer, **options) == expected
    assert way.errors == []


@pytest.mark.parametrize(
    ("answer", "begins", "error"),
    [
        ([SIZED + b"he", CLOSE], SIZED[:-4] + CLOSED + b"he", BrokenOffError),
        ([CHUNKED + b"5\r\nhel", CLOSE], CHUNKED[:-4] + CLOSED + b"3\r\nhel\r\n", BrokenOffError),
        ([CHUNKED + b"2\r\nhe\r\n", RESET], CHUNKED[:-4] + CLOSED + b"2\r\nhe\r\n", BrokenOffError),
        ([ENDLESS + b"he", RESET], CHUNKED[:-4] + CLOSED + b"2\r\nhe\r\n", BrokenOffError),
        ([CHUNKED + b"2\r\nhe\r\n", b"no number\r\n"], CHUNKED[:-4] + CLOSED + b"2\r\nhe\r\n", BrokenOffError),
        ([CLOSE], b"HTTP/1.1 502 ", NoAnswerError),
        ([RESET], b"HTTP/1.1 502 ", NoAnswerError),
        ([SIZED[:10], CLOSE], b"HTTP/1.1 502 ", NoAnswerError),
        ([b"SSH-2.0-OpenSSH\r\n"], b"HTTP/1.1 502 ", NoAnswerError),
        (
            [b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"],
            b"HTTP/1.1 502 ",
            NoAnswerError,
        ),
    ],
)
async def test_answers_that_break_off(way, answer, begins, error):
    got = await way.ask(answer)
    assert got.startswith(begins)
    assert not got.endswith(b"0\r\n\r\n")
    assert way.errors == [error]


async def test_connections_are_used_again_but_not_after_doubt(way):
    for _ in range(3):
        await way.ask([SIZED + b"hello"])
    assert way.script.connected == 1
    # The server closes what is idle: the next request goes over a new one.
    await way.ask([SIZED + b"hello", CLOSE])
    await asyncio.sleep(0.05)
    assert await way.ask([SIZED + b"hello"]) == SIZED[:-4] + CLOSED + b"hello"
    assert way.script.connected == 2
    # It says that it will close; it says more than it was asked for; its answer had no end of its own.
    last = [b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello"]
    for number, answer in enumerate((last, [SIZED + b"hello", b"more"], [SIZED])):
        await way.ask(answer, method="HEAD" if answer == [SIZED] else "POST")
        await asyncio.sleep(0.05)
        assert await way.ask([SIZED + b"hello"]) == SIZED[:-4] + CLOSED + b"hello"
        assert way.script.connected == 3 + number
    assert way.errors == []


async def test_an_answer_before_all_is_said(way):
    sent = b"x" * (8 << 20)
    refused = b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n"

    async def refuse(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(refused)
        await asyncio.sleep(0.05)
        writer.close()

    way.script.serve_one = refuse
    reader, writer = await asyncio.open_connection("127.0.0.1", way.port)
    writer.write(b"POST /x HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(sent) + sent)
    got = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert got == refused[:-4] + CLOSED
    assert way.errors == []


async def test_what_is_idle_is_closed(way, monkeypatch):
    monkeypatch.setattr("scepsy.deployment.connections._KEEP_ALIVE_S", 0.05)
    await way.ask([SIZED + b"hello"])
    await asyncio.sleep(0.2)
    await way.ask([SIZED + b"hello"])
    assert way.script.connected == 2


async def test_a_server_that_nobody_reaches(monkeypatch):
    engines = Connections()
    with pytest.raises(NotConnectedError, match="Connect call failed"):
        await engines.get(place_of("http://127.0.0.1:9"))

    async def never(*_args, **_options):
        await asyncio.sleep(60)

    monkeypatch.setattr("scepsy.deployment.connections.CONNECT_S", 0.01)
    monkeypatch.setattr(engines._loop, "create_connection", never)
    with pytest.raises(NotConnectedError, match="no connection within"):
        await engines.get(place_of("http://127.0.0.1:9"))


async def test_a_client_that_reads_slowly_slows_its_server_only(way):
    sent = 64 << 20
    block = b"x" * (1 << 20)
    written = []

    class Blocks(list):
        def __iter__(self):
            yield b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % sent
            for number in range(sent >> 20):
                written.append(number)
                yield block

    way.script.answers.append(Blocks())
    reader, writer = await asyncio.open_connection("127.0.0.1", way.port, limit=1 << 10)
    writer.write(b"GET /x HTTP/1.1\r\nHost: h\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    last = -1
    while len(written) != last:
        last = len(written)
        await asyncio.sleep(0.3)
    # What fits into sockets and buffers on the way, not all of it.
    assert last < 40
    got = 0
    while got < sent:
        got += len(await reader.read(1 << 20))
    writer.close()
    await writer.wait_closed()
    assert (got, way.errors) == (sent, [])


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", ("127.0.0.1", 8000, False, b"", b"127.0.0.1:8000")),
        ("https://u:p@api.example/base/", ("api.example", 443, True, b"/base", b"api.example")),
        ("http://[::1]:1", ("::1", 1, False, b"", b"[::1]:1")),
    ],
)
def test_what_a_base_url_names(url, expected):
    place = place_of(url)
    assert (place.host, place.port, place.is_secure, place.prefix, place.authority) == expected
