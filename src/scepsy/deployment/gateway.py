"""One OpenAI-compatible endpoint in front of all replicas: reads only the model's name, forwards the rest untouched."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

from aiohttp import web

from scepsy.deployment.affinity import Affinity
from scepsy.deployment.backends import Backend, NoBackendError, Pool
from scepsy.deployment.connections import Connections
from scepsy.deployment.forward import MAX_BODY_BYTES, exchange, relay
from scepsy.deployment.metrics import GatewayMetrics
from scepsy.deployment.naming import named_model, parsed
from scepsy.deployment.upstream import BrokenOffError, NoAnswerError, NotConnectedError
from scepsy.semconv import ATTEMPTS, REPLICA

if TYPE_CHECKING:
    from scepsy.collect.calls import RecordedCall, Recorder

RETRY_AFTER_S: Final = 2
REPLICA_HEADER: Final = "x-scepsy-replica"
# Two engines may be lost to one request, not all of them: what broke them may be the request.
_LOST_ANSWERS: Final = 2


def listed_model(llm: str, model: str, begun_s: float, max_model_len: int = 0) -> dict[str, Any]:
    """An LLM as vLLM lists it under /v1/models: what it is loaded from, and its longest context unless that is 0."""
    entry = {"id": llm, "object": "model", "created": int(begun_s), "owned_by": "scepsy", "root": model, "parent": None}
    return {**entry, "max_model_len": max_model_len} if max_model_len else entry


class Gateway:
    """Routes by model name to the least loaded replica; answers /health, /metrics and /v1/models itself."""

    def __init__(
        self,
        pools: Mapping[str, Pool],
        connections: Connections,
        *,
        models: Mapping[str, Mapping[str, Any]],
        status: Callable[[], Mapping[str, Any]],
        recorder: Recorder | None = None,
        affinity: Affinity | None = None,
        api_key: str | None = None,
    ) -> None:
        """`pools` by LLM; `models` are the entries of /v1/models; `status` is shown under /scepsy/status.

        With a `recorder` every call is recorded, and the engines' own traces lie below what was recorded. With an
        `affinity` requests that belong together go to one replica. With an `api_key` only those are forwarded that
        have it as bearer token, which goes no further.
        """
        self._pools = pools
        self._connections = connections
        self._models = models
        self._status = status
        self._recorder = recorder
        self._affinity = affinity
        self._token = f"Bearer {api_key}".encode() if api_key else None
        self._draining = False
        self._in_flight: set[asyncio.Task[Any]] = set()
        self._metrics = GatewayMetrics(pools)

    @property
    def in_flight(self) -> int:
        """Requests that are being forwarded."""
        return len(self._in_flight)

    def watch(self, backend: Backend) -> None:
        """Count for a replica that its pool has got since this gateway was made; pools and models are shared."""
        self._metrics.watch(backend)

    def forget(self, backend: Backend) -> None:
        """Show no more of a replica that has left its pool."""
        self._metrics.forget(backend)

    async def empty(self, backend: Backend, timeout_s: float) -> bool:
        """Wait until a replica, which must not be ready, has answered what it has; False where time ran out."""
        return await self._pools[backend.llm].drain(backend, timeout_s)

    async def drain(self, timeout_s: float) -> None:
        """Take no new requests, wait for those in flight, and break off those that outlast the time."""
        self._draining = True
        if self._in_flight:
            await asyncio.wait(self._in_flight, timeout=timeout_s)
        for task in list(self._in_flight):
            task.cancel()

    def add_routes(self, app: web.Application) -> None:
        """Make the application this gateway."""
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/metrics", self._show_metrics),
                web.get("/v1/models", self._list_models),
                web.get("/v1/models/{model:.+}", self._show_model),
                web.get("/scepsy/status", self._show_status),
                web.route("*", "/{path:.*}", self.forward),
            ]
        )

    async def forward(self, request: web.Request) -> web.StreamResponse:
        """Answer from a replica of the model that the request names."""
        if self._draining:
            return _unavailable("the deployment is stopping")
        if not self._admits(request):
            return _error(401, "Unauthorized", "AuthenticationError", None)
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return _error(
                400, "websockets are not forwarded: use HTTP, with server-sent events", "BadRequestError", None
            )
        if (request.content_length or 0) > MAX_BODY_BYTES:
            return _error(413, f"a body may have {MAX_BODY_BYTES} bytes", "RequestEntityTooLargeError", None)
        body = await request.read()
        content = parsed(body)
        name = named_model(request, body, content)
        if name is None:
            if len(self._pools) > 1:
                return _unnamed(request)
            # None at all while the only LLM is replaced by another.
            name = next(iter(self._pools), None)
            if name is None:
                return _error(503, "No LLM is served at the moment.", "ServiceUnavailableError", None)
        pool = self._pools.get(name)
        if pool is None:
            known = ", ".join(self._pools)
            return _error(404, f"The model `{name}` does not exist. There are: {known}.", "NotFoundError", "model")
        call = self._recorder.begin(request, content) if self._recorder is not None else None
        task = asyncio.current_task()
        assert task is not None  # noqa: S101 - handlers run in tasks
        self._in_flight.add(task)
        try:
            key = self._affinity.key(request.headers, content) if self._affinity is not None else None
            response = await self._send(request, body, pool, name, call, key)
        except BaseException:
            if call is not None:
                call.end(cancelled=True)
            raise
        finally:
            self._in_flight.discard(task)
        if call is not None:
            call.end(error=str(response.status) if response.status >= 400 else "")
        return response

    async def _send(
        self, request: web.Request, body: bytes, pool: Pool, name: str, call: RecordedCall | None, key: str | None
    ) -> web.StreamResponse:
        started_s = time.perf_counter()
        tried: set[str] = set()
        lost = 0
        while True:
            try:
                backend = await pool.acquire(tried, key)
            except NoBackendError:
                self._metrics.done(name, "", 503, started_s)
                return _unavailable(f"no replica of `{name}` is ready")
            backend.outstanding += 1
            status = 499
            try:
                carried = call.headers if call is not None else None
                withheld = () if self._token is None else (b"authorization",)
                async with exchange(self._connections, request, body, backend.url, carried, withheld) as answer:
                    status = answer.status
                    self._metrics.first_byte(name, started_s)
                    if call is not None:
                        call.note(REPLICA, backend.id)
                        call.answered(answer)
                    seen = call.chunk if call is not None else None
                    return await relay(request, answer, extra={REPLICA_HEADER: backend.id}, on_chunk=seen)
            except NotConnectedError:
                status = 502
                tried.add(backend.id)
            except NoAnswerError:
                status = 502
                lost += 1
                # Where there is no other it is asked once more: it may only have closed an idle connection.
                if any(other.ready and other.id not in (backend.id, *tried) for other in pool.backends):
                    tried.add(backend.id)
                if lost == _LOST_ANSWERS:
                    return _error(502, f"{lost} replicas of `{name}` ended while answering", "BadGatewayError", None)
                if call is not None:
                    call.note(ATTEMPTS, lost + 1)
            except BrokenOffError:
                status = 502
                # The connection is closed; what is returned goes nowhere.
                return web.Response(status=status)
            finally:
                backend.outstanding -= 1
                # One that a client leaves at its last piece, before its end, is an answer like others.
                backend.served += status not in (499, 502)
                self._metrics.done(name, backend.id, status, started_s)

    async def _health(self, _request: web.Request) -> web.Response:
        missing = [name for name, pool in self._pools.items() if not any(backend.ready for backend in pool.backends)]
        if missing or not self._pools:
            return web.json_response({"status": "not ready", "without_replica": missing}, status=503)
        return web.json_response({"status": "ok"})

    async def _show_metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": "text/plain; version=0.0.4"})

    def _admits(self, request: web.Request) -> bool:
        if self._token is None:
            return True
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        return hmac.compare_digest(given, self._token)

    async def _list_models(self, request: web.Request) -> web.Response:
        if not self._admits(request):
            return _error(401, "Unauthorized", "AuthenticationError", None)
        return web.json_response({"object": "list", "data": list(self._models.values())})

    async def _show_model(self, request: web.Request) -> web.Response:
        if not self._admits(request):
            return _error(401, "Unauthorized", "AuthenticationError", None)
        name = request.match_info["model"]
        if name not in self._models:
            return _error(404, f"The model `{name}` does not exist.", "NotFoundError", "model")
        return web.json_response(self._models[name])

    async def _show_status(self, _request: web.Request) -> web.Response:
        return web.json_response(self._status())


def _unnamed(request: web.Request) -> web.Response:
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        message = f"the body is packed (Content-Encoding: {encoding}), so its model cannot be read; send it unpacked"
        return _error(415, message, "UnsupportedMediaTypeError", None)
    return _error(400, "the request names no model", "BadRequestError", "model")


def _unavailable(message: str) -> web.Response:
    response = _error(503, message, "ServiceUnavailableError", None)
    response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


def _error(status: int, message: str, kind: str, param: str | None) -> web.Response:
    error = {"message": message, "type": kind, "param": param, "code": status}
    return web.json_response({"error": error}, status=status)
