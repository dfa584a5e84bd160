"""LlamaIndex's dispatcher spans and events, turned into handles.

A dispatcher span of a model or an embedding says nothing of a call: there are two or three per call, and that of a
stream ends when the generator is returned. A call runs from its start event to its end event.
"""

# ruff: noqa: ARG002 - LlamaIndex fixes the signatures
from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Final

from llama_index_instrumentation import get_dispatcher
from llama_index_instrumentation.event_handlers import BaseEventHandler
from llama_index_instrumentation.span import BaseSpan, active_span_id
from llama_index_instrumentation.span_handlers import BaseSpanHandler

from scepsy import semconv
from scepsy.capture import (
    Frame,
    Handle,
    Outcome,
    async_generator_steps,
    end_call,
    generator_steps,
    guard_task,
    harmless,
    how_ended,
    message,
    muted,
    note_content,
    now_ns,
    recorder,
    settings,
    settle_task,
    text_parts,
)
from scepsy.capture.content import Message
from scepsy.capture.tasks import unguard
from scepsy_integrations.llama_index.content import answer, said

_UUID_LENGTH: Final = 36
_LIMIT: Final = 10_000

_TRANSPARENT: Final = frozenset({"BaseLLM", "BaseEmbedding", "NodeParser"})
"""Models and embeddings are told by their events; parsers of text call nothing."""

_passed: Final[OrderedDict[str, Handle | None]] = OrderedDict()
"""Dispatcher spans without a span of their own, and the handle above each."""
_calls: Final[OrderedDict[str, list[Handle]]] = OrderedDict()
"""The open calls of each dispatcher span, in the order of their starts."""
_streams: Final[OrderedDict[str, tuple[Handle, bool]]] = OrderedDict()
"""Calls whose dispatcher span has ended with a generator that sends its request when it is first read, and whether that
has begun."""


class ScepsySpanHandler(BaseSpanHandler[BaseSpan]):
    """Handles for queries, retrievals, syntheses, tools, agents, workflows and their steps."""

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name for it."""
        return "ScepsySpanHandler"

    @harmless
    def span_enter(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        parent_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A dispatcher span begins."""
        if muted() or id_ in recorder.open:
            return
        ancestry = _ancestry(type(instance))  # type: ignore[arg-type] # mypy does not know that types are hashable
        if not ancestry.isdisjoint(_TRANSPARENT):
            _bounded(_passed, id_, _or_reading(_first_open(parent_id) or _above(parent_id)))
            return
        above = _above(parent_id)
        name = id_[: -_UUID_LENGTH - 1]
        if instance is not None:  # older versions name the class that defines the method
            name = f"{type(instance).__name__}.{name.rpartition('.')[2]}"
        parent, outer = recorder.around(above)
        kind, role = _kind_and_role(name, instance, ancestry, bound_args)
        if parent is None and kind == semconv.KIND_STEP:
            kind = semconv.KIND_WORKFLOW
        title = name if kind == semconv.KIND_STEP else role
        handle = recorder.start_below(parent, outer, kind, title, key=id_)
        if not role.endswith("Program") or parent is None:  # a way to call a model, not a reason to
            handle.role = role
        elif parent is not None:
            handle.role = parent.role

    @harmless
    def span_exit(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        result: Any | None = None,
        **kwargs: Any,
    ) -> None:
        """A dispatcher span has ended; a stream that it returns has not even begun."""
        _passed.pop(id_, None)
        if id_ in _calls:
            _pass_on(id_, result)
        handle = recorder.open.get(id_)
        if handle is not None and not _continues(handle, result):
            settle_task(handle)
            handle.end(outcome=_cancelled.pop(id_, None))

    @harmless
    def span_drop(
        self,
        id_: str,
        bound_args: inspect.BoundArguments,
        instance: Any | None = None,
        err: BaseException | None = None,
        **kwargs: Any,
    ) -> None:
        """A dispatcher span has failed or was cancelled."""
        for call in _calls.pop(id_, ()):
            end_call(call, err)
        _passed.pop(id_, None)
        handle = recorder.open.get(id_)
        if handle is not None:
            settle_task(handle)
            handle.end(error=err, outcome=how_ended(err))

    def new_span(self, *args: Any, **kwargs: Any) -> None:
        """Not used: what LlamaIndex would keep of a span is not needed."""

    def prepare_to_exit_span(self, *args: Any, **kwargs: Any) -> None:
        """Not used, as above."""

    def prepare_to_drop_span(self, *args: Any, **kwargs: Any) -> None:
        """Not used, as above."""


class ScepsyEventHandler(BaseEventHandler):
    """Calls of models, embeddings and rerankers."""

    @classmethod
    def class_name(cls) -> str:
        """LlamaIndex's name for it."""
        return "ScepsyEventHandler"

    @harmless
    def handle(self, event: Any, **kwargs: Any) -> None:
        """Something has happened."""
        react = _REACTIONS.get(type(event).__name__)
        if react is not None:
            react(event)


@harmless
def _pass_on(span_id: str, result: Any) -> None:
    """A dispatcher span returns a stream: the task and the spans that made it may end before anybody reads it."""
    if not isinstance(result, Iterator | AsyncIterator):
        return
    for call in _calls.get(span_id, ()):
        if call.live:
            weakref.finalize(result, _unread, span_id).atexit = False
            _bounded(_streams, span_id, (call, False))
            unguard(call)


def _progressed(event: Any) -> None:
    call = _first_open(event.span_id)
    if call is not None:
        _streams.pop(event.span_id or "", None)
        call.received()


def _answered(event: Any) -> None:
    call = _take(event.span_id)
    if call is not None:
        _describe(call, event.response)
        if settings.record_content and call.kind == semconv.KIND_LLM:
            note_content(call, semconv.OUTPUT_MESSAGES, lambda: [answer(event.response)])
        end_call(call)


def _finished(event: Any) -> None:
    call = _take(event.span_id)
    if call is not None:
        end_call(call)


def _failed(event: Any) -> None:
    call = _take(event.span_id)
    if call is not None:
        end_call(call, event.exception)


def _span_cancelled(event: Any) -> None:
    if event.span_id in recorder.open:
        _bounded(_cancelled, event.span_id, Outcome.CANCELLED)


@harmless
def _unread(span_id: str) -> None:
    """Nobody will read the stream that a dispatcher span has returned: if it has not begun, no event tells of it."""
    call = _take(span_id)
    if call is not None:
        end_call(call, GeneratorExit())


def _started(operation: str) -> Callable[[Any], object]:
    return lambda event: _start_call(operation, event.span_id, event.model_dict)


def _asked(operation: str, content: Callable[[Any], list[Message]]) -> Callable[[Any], None]:
    def react(event: Any) -> None:
        call = _start_call(operation, event.span_id, event.model_dict)
        if call is not None and settings.record_content:
            note_content(call, semconv.INPUT_MESSAGES, lambda: content(event))

    return react


# By name, so that LlamaIndex itself is not imported by an agent that uses only its workflows.
_REACTIONS: Final[dict[str, Callable[[Any], object]]] = {
    "LLMChatStartEvent": _asked(semconv.CHAT, lambda event: [said(one) for one in event.messages]),
    "LLMChatInProgressEvent": _progressed,
    "LLMChatEndEvent": _answered,
    "LLMCompletionStartEvent": _asked(
        semconv.TEXT_COMPLETION, lambda event: [message("user", text_parts(event.prompt))]
    ),
    "LLMCompletionInProgressEvent": _progressed,
    "LLMCompletionEndEvent": _answered,
    "EmbeddingStartEvent": _started(semconv.EMBEDDINGS),
    "EmbeddingEndEvent": _finished,
    "SparseEmbeddingStartEvent": _started(semconv.EMBEDDINGS),
    "SparseEmbeddingEndEvent": _finished,
    "ReRankStartEvent": lambda event: _start_call(semconv.RERANK, event.span_id, {"model_name": event.model_name}),
    "ReRankEndEvent": _finished,
    "ExceptionEvent": _failed,
    "SpanCancelledEvent": _span_cancelled,
}


_cancelled: Final[OrderedDict[str, Outcome]] = OrderedDict()


def _continues(handle: Handle, result: Any) -> bool:
    """If the result is an answer still to be streamed, let the handle end with the stream, and run it below the handle.

    LlamaIndex calls the model only when the stream is read, after the query that it belongs to has returned.
    """
    streaming = _STREAMING.get(type(result).__name__)
    if streaming is None:
        return False
    frame = _frames.get(result.response_gen)
    if frame is not None:  # the same answer, returned through another level
        frame.handles.append(handle)
        return True
    source: Any = result.response_gen
    frame = Frame(handle)
    frame.left_ns = now_ns()
    result.response_gen = streaming(lambda: (frame, source))()
    _frames[result.response_gen] = frame
    weakref.finalize(result.response_gen, frame.end, GeneratorExit())  # in case that nobody ever reads it
    return True


_frames: Final[weakref.WeakKeyDictionary[Any, Frame]] = weakref.WeakKeyDictionary()


_STREAMING: Final[dict[str, Callable[..., Any]]] = {
    "StreamingResponse": generator_steps,
    "AsyncStreamingResponse": async_generator_steps,
}


@functools.cache
def _ancestry(kind: Any) -> frozenset[str]:
    return frozenset(base.__name__ for base in kind.__mro__)


def _kind_and_role(
    name: str, instance: Any, ancestry: frozenset[str], bound_args: inspect.BoundArguments
) -> tuple[str, str]:
    """What a dispatcher span stands for, and the role that it gives to the calls below it."""
    owner, _, method = name.rpartition(".")
    if instance is None or ("Workflow" in ancestry and method != "run"):
        # A step of a workflow, or a function with a span. The steps of agents are told whose turn it is.
        turn = getattr(bound_args.arguments.get("ev"), "current_agent_name", None)
        return semconv.KIND_STEP, str(turn or method)
    if "BaseTool" in ancestry:
        return semconv.KIND_TOOL, str(instance.metadata.name)
    if "BaseWorkflowAgent" in ancestry:
        return semconv.KIND_AGENT, str(instance.name)
    return semconv.KIND_STEP, owner or name


def _start_call(operation: str, span_id: str | None, model: dict[str, Any]) -> Handle | None:
    if muted():
        return None
    name = model.get("model_name") or model.get("model") or model.get("class_name") or ""
    parent, outer = recorder.around(_above(span_id), without=_current)
    handle = recorder.start_below(parent, outer, semconv.KIND_LLM, str(name), operation=operation)
    guard_task(handle)
    key = span_id or ""
    calls = _calls.get(key)
    if calls is None:
        _bounded(_calls, key, [handle])
    else:
        calls.append(handle)
    return handle


def _first_open(span_id: str | None) -> Handle | None:
    for call in _calls.get(span_id or "", ()):
        if call.live:
            return call
    return None


def _take(span_id: str | None) -> Handle | None:
    """Remove and return the oldest call of a dispatcher span."""
    key = span_id or ""
    _streams.pop(key, None)
    calls = _calls.get(key)
    if not calls:
        return None
    call = calls.pop(0)
    if not calls:
        del _calls[key]
    return call


def _above(span_id: str | None) -> Handle | None:
    if span_id is None:
        return None
    return recorder.open.get(span_id) or _passed.get(span_id)


def _current() -> Handle | None:
    """The call or span of LlamaIndex that the caller is in."""
    span_id = active_span_id.get()
    if span_id is not None:
        calls = [call for call in _calls.get(span_id, ()) if call.live]
        if calls:
            # Several batches of an embedding are opened before the first is sent; they are sent in their order.
            return _or_reading(next((call for call in calls if call.accepting), calls[0]))
        return _or_reading(_above(span_id))
    return _or_reading(None)


def _or_reading(found: Handle | None) -> Handle | None:
    """What was found around the caller, unless a stream has begun to be read since then."""
    call = _reading() if _streams else None
    return call if call is not None and (found is None or call.start_ns > found.start_ns) else found


def _reading() -> Handle | None:
    """The stream that is being read below the caller.

    Its request is sent by the generator's first step, when its dispatcher span is over: only the frame of LlamaIndex's
    wrapper around the generator still knows which call it is. The call starts with that step: whoever reads the stream
    may have started after it was made, and is around it all the same.
    """
    frame = sys._getframe(2)  # noqa: SLF001 - the only way to the frames
    while frame is not None:
        if frame.f_code.co_name == "wrapped_gen":
            span_id = frame.f_locals.get("span_id", "")
            call, has_begun = _streams.get(span_id, (None, False))
            if call is not None and call.live:
                if not has_begun:
                    _streams[span_id] = (call, True)
                    call.restart(call.name, now_ns())
                return call
        frame = frame.f_back  # type: ignore[assignment] # None ends the loop
    return None


def _describe(call: Handle, response: Any) -> None:
    """Note tokens and identity, unless the server itself has told them already."""
    if call.kind != semconv.KIND_LLM:
        return
    attributes = call.attributes
    raw = getattr(response, "raw", None)
    extra = getattr(response, "additional_kwargs", None) or {}
    usage = raw.get("usage") if isinstance(raw, dict) else getattr(raw, "usage", None)
    for key, source, names in (
        (semconv.INPUT_TOKENS, usage, ("prompt_tokens", "input_tokens")),
        (semconv.OUTPUT_TOKENS, usage, ("completion_tokens", "output_tokens")),
        (semconv.INPUT_TOKENS, extra, ("prompt_tokens",)),
        (semconv.OUTPUT_TOKENS, extra, ("completion_tokens",)),
    ):
        for name in names:
            value = source.get(name) if isinstance(source, dict) else getattr(source, name, None)
            if isinstance(value, int):
                attributes.setdefault(key, value)
    for key, name in ((semconv.RESPONSE_ID, "id"), (semconv.RESPONSE_MODEL, "model")):
        value = raw.get(name) if isinstance(raw, dict) else getattr(raw, name, None)
        if isinstance(value, str):
            attributes.setdefault(key, value)


def _bounded(memory: OrderedDict[str, Any], key: str, value: Any) -> None:
    memory[key] = value
    if len(memory) > _LIMIT:
        memory.popitem(last=False)


_span_handler: Final = ScepsySpanHandler()
_event_handler: Final = ScepsyEventHandler()


def turn_on() -> None:
    """Listen at the root dispatcher."""
    root = get_dispatcher()
    if _span_handler not in root.span_handlers:
        root.add_span_handler(_span_handler)
        root.add_event_handler(_event_handler)
        recorder.sources.append(_current)


def turn_off() -> None:
    """Listen no longer."""
    root = get_dispatcher()
    root.span_handlers = [handler for handler in root.span_handlers if handler is not _span_handler]
    root.event_handlers = [handler for handler in root.event_handlers if handler is not _event_handler]
    if _current in recorder.sources:
        recorder.sources.remove(_current)
