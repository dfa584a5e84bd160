"""In front of any server that speaks OpenAI's API: passes everything on, and records the calls."""

from __future__ import annotations

from typing import Final

import orjson
from aiohttp import web
from yarl import URL

from scepsy.collect.calls import RecordedCall, Recorder
from scepsy.deployment.connections import Connections
from scepsy.deployment.forward import exchange, relay
from scepsy.deployment.upstream import BrokenOffError, NoAnswerError, NotConnectedError
from scepsy_optimizer.errors import ScepsyError

_SCHEMES: Final = ("http", "https")


class Upstream:
    """The server behind the proxy.

    `url` may end with /v1, as a client's base URL does: clients give the proxy's address in its place.
    """

    def __init__(self, url: str, connections: Connections, recorder: Recorder) -> None:
        """Raises ScepsyError for what is no URL of a server."""
        try:
            parsed = URL(url.rstrip("/").removesuffix("/v1"))
        except ValueError as error:
            raise ScepsyError(f"upstream {url!r}: {error}") from error
        if parsed.scheme not in _SCHEMES or not parsed.host:
            raise ScepsyError(f"upstream {url!r}: write a URL such as http://127.0.0.1:8000/v1")
        self.url = str(parsed).rstrip("/")
        self._host = {"Host": parsed.raw_authority.rpartition("@")[2]}
        self._connections = connections
        self._recorder = recorder

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Answer as the server does."""
        body = await request.read()
        call = self._recorder.begin(request, _parsed(body))
        try:
            response = await self._send(request, body, call)
        except BaseException:
            if call is not None:
                call.end(cancelled=True)
            raise
        if call is not None:
            call.end(error=str(response.status) if response.status >= 400 else "")
        return response

    async def _send(self, request: web.Request, body: bytes, call: RecordedCall | None) -> web.StreamResponse:
        extra = {**self._host, **(call.headers if call is not None else {})}
        try:
            async with exchange(self._connections, request, body, self.url, extra) as answer:
                if call is not None:
                    call.answered(answer)
                return await relay(request, answer, on_chunk=call.chunk if call is not None else None)
        except NotConnectedError as error:
            return _bad_gateway(f"{self.url} cannot be reached: {error}")
        except NoAnswerError as error:
            return _bad_gateway(f"{self.url} gave no answer: {error}")
        except BrokenOffError:
            # The connection is closed; what is returned goes nowhere.
            return web.Response(status=502)


def _parsed(body: bytes) -> dict[str, object] | None:
    try:
        content = orjson.loads(body)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _bad_gateway(message: str) -> web.Response:
    error = {"message": message, "type": "BadGatewayError", "param": None, "code": 502}
    return web.json_response({"error": error}, status=502)
