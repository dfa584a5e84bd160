"""What is no engine, or breaks off in the middle, is one clear error."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from scepsy.profiling.endpoint import open_endpoint
from scepsy_optimizer.errors import ScepsyError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("answer", ["<html>hello</html>", "[1, 2]", '{"models": []}', '{"data": ["m"]}'])
async def test_what_lists_no_models_is_no_engine(answer):
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(text=answer)

    async with serving(handler) as url, open_endpoint(url, "m") as endpoint:
        with pytest.raises(ScepsyError, match="answers no list of models but .*OpenAI-compatible") as caught:
            await endpoint.facts()
        assert url in str(caught.value)


async def test_an_answer_that_breaks_off():
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"choices": [{"text": "a"}], "usage": {"completion_tokens": 1}}\n\n')
        assert request.transport is not None
        request.transport.abort()
        return response

    async with serving(handler) as url, open_endpoint(url, "m") as endpoint:
        with pytest.raises(ScepsyError, match="broke off"):
            await endpoint.complete(8, 4)


async def test_nobody_listens():
    async with open_endpoint("http://127.0.0.1:9/v1", "m") as endpoint:
        with pytest.raises(ScepsyError, match=r"127\.0\.0\.1:9/v1/models cannot be reached.*is the engine running"):
            await endpoint.facts()
