"""The hook for `openai.OpenAI` and `openai.AsyncOpenAI`, versions 2 and 3, Azure included.

All endpoints, sync or async, parsed, raw or streamed, go through the client's `request`, and every attempt through its
`_prepare_request`: these two, the pause between attempts and the moment before the answer is parsed are what is hooked.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from typing import Any, Final

from scepsy import semconv
from scepsy.capture import Exchange, attach, detach, harmless, muted, recorder, settings
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

_RAW_RESPONSE: Final = "X-Stainless-Raw-Response"
"""The header by which `with_raw_response` and `with_streaming_response` tell `request` what to return."""

_sending: ContextVar[Exchange | None] = ContextVar("scepsy_openai_sending", default=None)


@harmless
def _begin(client: Any, options: Any, streamed: bool) -> Exchange | None:  # noqa: FBT001 - as the client passes it on
    operation = _OPERATIONS.get(options.url.removeprefix("/v1").removeprefix("/v2"))
    if operation is None or options.method.lower() != "post" or muted():
        return None
    body = options.json_data
    model = body.get("model") if isinstance(body, dict) else None
    url = client.base_url
    exchange = Exchange.begin(
        recorder,
        operation,
        model=model if isinstance(model, str) else "",
        provider="openai",
        address=url.host,
        port=url.port or (443 if url.scheme == "https" else 80),
        streamed=streamed,
    )
    if isinstance(body, dict):
        if records_content(exchange):
            note_question(exchange.handle, body)
        if streamed and settings.include_usage:
            _ask_for_usage(exchange, options, body)
    return exchange


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
def _enter(exchange: Exchange) -> tuple[Token[Exchange | None], object]:
    return _sending.set(exchange), attach(exchange.handle)


@harmless
def _leave(tokens: tuple[Token[Exchange | None], object] | None) -> None:
    if tokens is not None:
        detach(tokens[1])
        _sending.reset(tokens[0])


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
def _attempt(request: Any) -> None:
    exchange = _sending.get()
    if exchange is not None:
        exchange.attempt()
        headers = request.headers
        if "traceparent" not in headers:
            for name, value in exchange.handle.traceparent().items():
                headers[name] = value


@harmless
def _backoff() -> None:
    exchange = _sending.get()
    if exchange is not None:
        exchange.backoff()


@harmless
def _arrived() -> None:
    exchange = _sending.get()
    if exchange is not None:
        exchange.arrived()


def _request(wrapped: Callable[..., Any], client: Any, cast_to: Any, options: Any, **kwargs: Any) -> Any:
    exchange = _begin(client, options, bool(kwargs.get("stream")))
    if exchange is None:
        return wrapped(cast_to, options, **kwargs)
    tokens = _enter(exchange)
    try:
        answer = wrapped(cast_to, options, **kwargs)
    except BaseException as error:
        _failed(exchange, error)
        raise
    finally:
        _leave(tokens)
    _answered(exchange, answer)
    return answer


async def _async_request(wrapped: Callable[..., Any], client: Any, cast_to: Any, options: Any, **kwargs: Any) -> Any:
    exchange = _begin(client, options, bool(kwargs.get("stream")))
    if exchange is None:
        return await wrapped(cast_to, options, **kwargs)
    tokens = _enter(exchange)
    try:
        answer = await wrapped(cast_to, options, **kwargs)
    except BaseException as error:
        _failed(exchange, error)
        raise
    finally:
        _leave(tokens)
    _answered(exchange, answer)
    return answer


def _prepare_request(wrapped: Callable[..., Any], _client: Any, request: Any) -> Any:
    _attempt(request)
    return wrapped(request)


def _sleep_for_retry(wrapped: Callable[..., Any], _client: Any, *args: Any, **kwargs: Any) -> Any:
    _backoff()
    return wrapped(*args, **kwargs)


def _process_response(wrapped: Callable[..., Any], _client: Any, *args: Any, **kwargs: Any) -> Any:
    _arrived()
    return wrapped(*args, **kwargs)


_Hook = Callable[..., Any]
"""What runs in place of a bound method: called with that method, the client, and the method's arguments."""


def _hooks(*, asynchronous: bool) -> dict[str, _Hook]:
    return {
        "request": _async_request if asynchronous else _request,
        "_prepare_request": _prepare_request,
        "_sleep_for_retry": _sleep_for_retry,
        "_process_response": _process_response,
    }


class _ClassPatch:
    """One method of a class with a hook around it, until it is undone."""

    def __init__(self, owner: type, name: str, hook: _Hook) -> None:
        self.owner = owner
        self.name = name
        self.on = True
        self.own = name in vars(owner)
        self.original = original = getattr(owner, name)

        @functools.wraps(original)
        def method(client: Any, *args: Any, **kwargs: Any) -> Any:
            if self.on and _INSTRUMENTED not in vars(client):
                return hook(functools.partial(original, client), client, *args, **kwargs)
            return original(client, *args, **kwargs)

        self.replacement = method
        setattr(owner, name, method)

    def undo(self) -> None:
        """Restore the method; if somebody else has wrapped it since, only fall silent."""
        self.on = False
        if vars(self.owner).get(self.name) is not self.replacement:
            return
        if self.own:
            setattr(self.owner, self.name, self.original)
        else:
            delattr(self.owner, self.name)


_INSTRUMENTED: Final = "_scepsy_instrumented"


def instrument_client(client: object) -> Callable[[], None] | None:
    """Hook one client object, and those made from it by `with_options`. The result undoes it; None: of another kind."""
    openai = sys.modules.get("openai")
    if openai is None or not isinstance(client, (openai.OpenAI, openai.AsyncOpenAI)):
        return None
    own = vars(client)
    if _INSTRUMENTED in own:
        return lambda: None
    hooks = _hooks(asynchronous=isinstance(client, openai.AsyncOpenAI))
    for name, hook in hooks.items():
        method = getattr(client, name)
        setattr(client, name, functools.wraps(method)(functools.partial(hook, method, client)))

    def copying(copy: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(copy)
        def copied(*args: Any, **kwargs: Any) -> Any:
            clone = copy(*args, **kwargs)
            instrument_client(clone)
            return clone

        return copied

    names = ("copy", "with_options")
    for name in names:
        setattr(client, name, copying(getattr(client, name)))
    setattr(client, _INSTRUMENTED, True)

    def undo() -> None:
        for name in (*hooks, *names, _INSTRUMENTED):
            own.pop(name, None)

    return undo


_patches: Final[list[_ClassPatch]] = []


def turn_on() -> None:
    """Hook the client classes."""
    import openai

    if not _patches:
        for owner, asynchronous in ((openai.OpenAI, False), (openai.AsyncOpenAI, True)):
            _patches.extend(_ClassPatch(owner, name, hook) for name, hook in _hooks(asynchronous=asynchronous).items())


def turn_off() -> None:
    """Restore them."""
    while _patches:
        _patches.pop().undo()
