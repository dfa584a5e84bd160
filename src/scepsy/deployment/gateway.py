"""One OpenAI-compatible endpoint in front of all replicas: reads only the model's name, forwards the rest untouched."""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import orjson
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from scepsy.deployment.affinity import Affinity
from scepsy.deployment.backends import Backend, NoBackendError, Pool
from scepsy.deployment.forward import BrokenOffError, NoAnswerError, NotConnectedError, exchange, relay
from scepsy.semconv import ATTEMPTS, REPLICA

if TYPE_CHECKING:
    from scepsy.collect.calls import RecordedCall, Recorder

RETRY_AFTER_S: Final = 2
REPLICA_HEADER: Final = "x-scepsy-replica"
_SECONDS: Final = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_FORM_MODEL: Final = re.compile(rb'name="?model"?[^\r\n]*\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]*)\r\n')
# Two engines may be lost to one request, not all of them: what broke them may be the request.
_LOST_ANSWERS: Final = 2


class Gateway:
    """Routes by model name to the least loaded replica; answers /health, /metrics and /v1/models itself."""

    def __init__(
        self,
        pools: Mapping[str, Pool],
        session: aiohttp.ClientSession,
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
        self._session = session
        self._models = models
        self._status = status
        self._recorder = recorder
        self._affinity = affinity
        self._token = f"Bearer {api_key}".encode() if api_key else None
        self._draining = False
        self._in_flight: set[asyncio.Task[Any]] = set()
        self._metrics = _Metrics(pools)

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
        body = await request.read()
        content = parsed(body)
        name = content.get("model") if content is not None else form_model(body, request.content_type)
        if not isinstance(name, str):
            if len(self._pools) > 1:
                return _error(400, "the request names no model", "BadRequestError", "model")
            name = next(iter(self._pools))
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
                withheld = () if self._token is None else ("Authorization",)
                async with exchange(self._session, request, body, backend.url, carried, withheld) as answer:
                    status = answer.status
                    self._metrics.first_byte(name, started_s)
                    if call is not None:
                        call.note(REPLICA, backend.id)
                        call.answered(answer)
                    seen = call.chunk if call is not None else None
                    response = await relay(request, answer, extra={REPLICA_HEADER: backend.id}, on_chunk=seen)
                    backend.served += 1
                    return response
            except NotConnectedError:
                status = 502
                tried.add(backend.id)
            except NoAnswerError:
                status = 502
                lost += 1
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
                self._metrics.done(name, backend.id, status, started_s)

    async def _health(self, _request: web.Request) -> web.Response:
        missing = [name for name, pool in self._pools.items() if not any(backend.ready for backend in pool.backends)]
        if missing:
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


class _Metrics:
    """The gateway's own counts for Prometheus."""

    def __init__(self, pools: Mapping[str, Pool]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "scepsy_gateway_requests", "Requests answered.", ("llm", "replica", "status"), registry=registry
        )
        self._seconds = Histogram(
            "scepsy_gateway_request_seconds", "Arrival to last byte.", ("llm",), registry=registry, buckets=_SECONDS
        )
        self._first = Histogram(
            "scepsy_gateway_first_byte_seconds", "Arrival to first byte.", ("llm",), registry=registry, buckets=_SECONDS
        )
        self._outstanding = Gauge(
            "scepsy_gateway_outstanding", "Requests being answered.", ("llm", "replica"), registry=registry
        )
        self._ready = Gauge("scepsy_gateway_ready", "1 if the replica is ready.", ("llm", "replica"), registry=registry)
        # Children are looked up once per combination: a lookup by labels costs as much as all else here.
        self._counters: dict[tuple[str, str, int], Counter] = {}
        self._timed: dict[str, Histogram] = {}
        self._firsts: dict[str, Histogram] = {}
        for pool in pools.values():
            for backend in pool.backends:
                self.watch(backend)

    def watch(self, backend: Backend) -> None:
        self._timed[backend.llm] = self._seconds.labels(backend.llm)
        self._firsts[backend.llm] = self._first.labels(backend.llm)
        self._outstanding.labels(backend.llm, backend.id).set_function(lambda: backend.outstanding)
        self._ready.labels(backend.llm, backend.id).set_function(lambda: float(backend.ready))

    def forget(self, backend: Backend) -> None:
        self._outstanding.remove(backend.llm, backend.id)
        self._ready.remove(backend.llm, backend.id)

    def first_byte(self, llm: str, started_s: float) -> None:
        self._firsts[llm].observe(time.perf_counter() - started_s)

    def done(self, llm: str, replica: str, status: int, started_s: float) -> None:
        key = (llm, replica, status)
        counter = self._counters.get(key)
        if counter is None:
            counter = self._counters[key] = self._requests.labels(llm, replica, str(status))
        counter.inc()
        self._timed[llm].observe(time.perf_counter() - started_s)

    def text(self) -> bytes:
        return generate_latest(self._registry)


def parsed(body: bytes) -> dict[str, Any] | None:
    """A body that is a JSON object; None for any other."""
    if body.lstrip()[:1] != b"{":
        return None
    try:
        content = orjson.loads(body)
    except ValueError:
        # What vLLM takes as well: NaN, Infinity, broken surrogates.
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            return None
    return content if isinstance(content, dict) else None


def form_model(body: bytes, content_type: str) -> str | None:
    """The model that a form names; None if it is none, or names none."""
    found = _FORM_MODEL.search(body) if content_type == "multipart/form-data" else None
    return found[1].decode("utf-8", "replace") if found else None


def _unavailable(message: str) -> web.Response:
    response = _error(503, message, "ServiceUnavailableError", None)
    response.headers["Retry-After"] = str(RETRY_AFTER_S)
    return response


def _error(status: int, message: str, kind: str, param: str | None) -> web.Response:
    error = {"message": message, "type": kind, "param": param, "code": status}
    return web.json_response({"error": error}, status=status)
