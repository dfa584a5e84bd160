"""The hook for `openai.OpenAI` and `openai.AsyncOpenAI`, versions 2 and 3, Azure included.

All endpoints, sync or async, parsed, raw or streamed, go through the client's `request`: that, the pause between
attempts and the moment before the answer is parsed are what is hooked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, Final
from weakref import WeakSet, ref

from scepsy import semconv
from scepsy.capture import (
    Exchange,
    Method,
    Patch,
    attach,
    current_handle,
    detach,
    harmless,
    muted,
    recorder,
    settings,
)
from scepsy_integrations.openai.answers import describe, is_raw
from scepsy_integrations.openai.content import note_answer, note_question, records_content
from scepsy_integrations.openai.streams import watch

_OPERATIONS: Final = {
    "/chat/completions": semconv.CHAT,
    "/responses": semconv.CHAT,
    "/completions": semconv.TEXT_COMPLETION,
    "/embeddings": semconv.EMBEDDINGS,
    # vLLM's own, sent through client.post.
    "/rerank": semconv.RERANK,
    "/score": semconv.RERANK,
    "/pooling": semconv.EMBEDDINGS,
    "/classify": semconv.RERANK,
}

_TRACEPARENT_LENGTH: Final = len("traceparent")
_RAW_RESPONSE: Final = "X-Stainless-Raw-Response"
"""The header by which `with_raw_response` and `with_streaming_response` tell `request` what to return."""


class _Sending:
    """A request that is being sent, current meanwhile."""

    __slots__ = ("changed", "exchange", "given", "options", "token")

    def __init__(self, exchange: Exchange, options: Any) -> None:
        self.exchange = exchange
        self.options = options
        self.token = attach(exchange.handle)
        self.given: Any = None
        self.changed: dict[str, Any] | None = None

    def put_headers(self, own_headers: Mapping[str, Any]) -> None:
        """The headers that each attempt is to carry, unless the program or its client has them, into its options."""
        self.given = options_headers = self.options.headers
        known = options_headers if isinstance(options_headers, Mapping) else {}
        for names in (known, own_headers):
            for name in names:
                if len(name) == _TRACEPARENT_LENGTH and name.lower() == "traceparent":
                    return
        self.options.headers = self.changed = {**known, **self.exchange.handle.traceparent()}

    def leave(self) -> None:
        """It is sent, or has failed; the options may be the program's own, which sends them again."""
        detach(self.token)
        if self.changed is not None and self.options.headers is self.changed:
            self.options.headers = self.given


@harmless
def _begin(client: Any, options: Any, streamed: bool) -> _Sending | None:  # noqa: FBT001 - as the client passes it on
    operation = _OPERATIONS.get(options.url) or _OPERATIONS.get(options.url.removeprefix("/v1").removeprefix("/v2"))
    if operation is None or options.method.lower() != "post" or muted():
        return None
    body = options.json_data
    model = body.get("model") if isinstance(body, dict) else None
    _, address, port = _server(client.base_url)
    exchange = Exchange.begin(
        recorder,
        operation,
        model=model if isinstance(model, str) else "",
        provider="openai",
        address=address,
        port=port,
        streamed=streamed,
    )
    if isinstance(body, dict):
        if records_content(exchange):
            note_question(exchange.handle, body)
        if streamed and settings.include_usage:
            _ask_for_usage(exchange, options, body)
    sending = _Sending(exchange, options)
    _put_headers(sending, getattr(client, "_custom_headers", None) or {})
    return sending


@harmless
def _put_headers(sending: _Sending, own_headers: Mapping[str, Any]) -> None:
    sending.put_headers(own_headers)


_servers: Final[dict[int, tuple[Any, str, int]]] = {}
_MOST_SERVERS: Final = 64


def _server(url: Any) -> tuple[Any, str, int]:
    """Host and port of a client's address, which is the same object in each of its calls."""
    known = _servers.get(id(url))
    if known is None or known[0] is not url:
        if len(_servers) >= _MOST_SERVERS:
            _servers.clear()
        known = _servers[id(url)] = (url, url.host, url.port or (443 if url.scheme == "https" else 80))
    return known


@harmless
def _ask_for_usage(exchange: Exchange, options: Any, body: dict[str, Any]) -> None:
    """Ask for the token counts of a stream, unless the program has said whether it wants them.

    Not where it reads the response itself: there the additional piece could not be kept from it.
    """
    if not options.url.endswith("/completions") or "stream_options" in (options.extra_json or ()):
        return
    if isinstance(options.headers, Mapping) and _RAW_RESPONSE in options.headers:
        return
    chosen = body.get("stream_options") or {}
    if "include_usage" not in chosen:
        options.json_data = {**body, "stream_options": {**chosen, "include_usage": True}}
        exchange.hides_usage = True


@harmless
def _answered(exchange: Exchange, answer: Any) -> None:
    followed = False
    try:
        followed = watch(exchange, answer)
        if not followed:
            describe(exchange, answer)
            if records_content(exchange):
                note_answer(exchange.handle, answer.parse() if is_raw(answer) else answer)
    finally:
        if not followed:
            exchange.succeed()


@harmless
def _failed(exchange: Exchange, error: BaseException) -> None:
    exchange.fail(error)


@harmless
def _leave(sending: _Sending) -> None:
    sending.leave()


def _current() -> Exchange | None:
    handle = current_handle()
    exchange = None if handle is None else handle.exchange
    return exchange if isinstance(exchange, Exchange) else None


@harmless
def _backoff() -> None:
    exchange = _current()
    if exchange is not None:
        exchange.backoff()


@harmless
def _again() -> None:
    exchange = _current()
    if exchange is not None:
        exchange.attempt()


@harmless
def _arrived() -> None:
    exchange = _current()
    if exchange is not None:
        exchange.arrived()


def _request(patch: Patch) -> Method:
    original = patch.original

    def request(client: Any, cast_to: Any, options: Any, **kwargs: Any) -> Any:
        sending = _begin(client, options, bool(kwargs.get("stream"))) if patch.on else None
        if sending is None:
            return original(client, cast_to, options, **kwargs)
        try:
            answer = original(client, cast_to, options, **kwargs)
        except BaseException as error:
            _failed(sending.exchange, error)
            raise
        finally:
            _leave(sending)
        _answered(sending.exchange, answer)
        return answer

    return request


def _async_request(patch: Patch) -> Method:
    original = patch.original

    async def request(client: Any, cast_to: Any, options: Any, **kwargs: Any) -> Any:
        sending = _begin(client, options, bool(kwargs.get("stream"))) if patch.on else None
        if sending is None:
            return await original(client, cast_to, options, **kwargs)
        try:
            answer = await original(client, cast_to, options, **kwargs)
        except BaseException as error:
            _failed(sending.exchange, error)
            raise
        finally:
            _leave(sending)
        _answered(sending.exchange, answer)
        return answer

    return request


def _processing(patch: Patch) -> Method:
    original = patch.original

    def process(client: Any, *args: Any, **kwargs: Any) -> Any:
        if patch.on:
            _arrived()
        return original(client, *args, **kwargs)

    return process


def _pausing(patch: Patch) -> Method:
    original = patch.original

    def pause(client: Any, *args: Any, **kwargs: Any) -> Any:
        if not patch.on:
            return original(client, *args, **kwargs)
        _backoff()
        result = original(client, *args, **kwargs)
        _again()
        return result

    return pause


def _async_pausing(patch: Patch) -> Method:
    original = patch.original

    async def pause(client: Any, *args: Any, **kwargs: Any) -> Any:
        if not patch.on:
            return await original(client, *args, **kwargs)
        _backoff()
        result = await original(client, *args, **kwargs)
        _again()
        return result

    return pause


def _hooks(*, asynchronous: bool) -> dict[str, Callable[[Patch], Method]]:
    return {
        "request": _async_request if asynchronous else _request,
        "_sleep_for_retry": _async_pausing if asynchronous else _pausing,
        "_process_response": _processing,
    }


_patches: Final[list[Patch]] = []
_OF_CLIENT: Final = "_scepsy_undo"


def instrument_client(client: object) -> Callable[[], None] | None:
    """Hook one client object, and those made from it by `with_options`. The result undoes it; None: of another kind."""
    openai = sys.modules.get("openai")
    if openai is None or not isinstance(client, (openai.OpenAI, openai.AsyncOpenAI)):
        return None
    if _patches or _OF_CLIENT in vars(client):  # all clients are hooked, or this one
        return lambda: None

    clones: WeakSet[Any] = WeakSet()

    def copying(patch: Patch) -> Method:
        def copied(client: Any, *args: Any, **kwargs: Any) -> Any:
            clone = patch.original(client, *args, **kwargs)
            if patch.on and instrument_client(clone) is not None:
                clones.add(clone)
            return clone

        return copied

    hooks = _hooks(asynchronous=isinstance(client, openai.AsyncOpenAI))
    patches = [Patch(client, name, hook) for name, hook in {**hooks, "copy": copying, "with_options": copying}.items()]

    def undo() -> None:
        for patch in patches:
            patch.undo()
        vars(client).pop(_OF_CLIENT, None)
        for clone in list(clones):
            vars(clone).get(_OF_CLIENT, _nothing)()

    vars(client)[_OF_CLIENT] = undo
    # Whoever keeps the result does not keep the client: some programs make one for every request.
    known = ref(client)

    def undo_if_there() -> None:
        living = known()
        if living is not None:
            vars(living).get(_OF_CLIENT, _nothing)()

    return undo_if_there


def _nothing() -> None:
    """Undo nothing."""


def turn_on() -> None:
    """Hook the client classes."""
    import openai

    if not _patches:
        for owner, asynchronous in ((openai.OpenAI, False), (openai.AsyncOpenAI, True)):
            _patches.extend(Patch(owner, name, hook) for name, hook in _hooks(asynchronous=asynchronous).items())


def turn_off() -> None:
    """Restore them."""
    while _patches:
        _patches.pop().undo()
