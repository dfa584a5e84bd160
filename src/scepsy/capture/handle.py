"""One thing that runs: its place among the others, and the span that it becomes."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import Token
from enum import Enum
from typing import TYPE_CHECKING, Final

from opentelemetry import context as context_api
from opentelemetry import trace
from opentelemetry.context.context import Context
from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from scepsy import semconv
from scepsy.capture.safety import logger

if TYPE_CHECKING:
    from scepsy.capture.recorder import Recorder

Attribute = str | bool | int | float

HANDLE_KEY: Final = context_api.create_key("scepsy-handle")
SPAN_KEY: Final = next(iter(trace.set_span_in_context(trace.INVALID_SPAN, Context())))
"""Where OpenTelemetry keeps the current span in a context."""
PROPAGATOR: Final = TraceContextTextMapPropagator()


def clock_offset_ns(
    wall_ns: Callable[[], int] = time.time_ns, steady_ns: Callable[[], int] = time.perf_counter_ns
) -> int:
    """What the wall clock is ahead of the steady one: by the quickest of several readings.

    A thread may be stopped between two of them, and every span would lie that much too early, before its parent if
    that is somebody else's.
    """

    def read() -> tuple[int, int]:
        before, wall, after = steady_ns(), wall_ns(), steady_ns()
        return after - before, wall - (before + after) // 2

    return min(read() for _ in range(8))[1]


# Wall time that neither jumps nor runs backwards while this process lives: durations must be right first of all.
_CLOCK_OFFSET_NS: Final = clock_offset_ns()
# Not the program's own generator: programs seed that, and then every run of theirs would have the same ids.
_ids: Final = random.Random()  # noqa: S311 - ids are no secrets
_keys: Final = itertools.count()
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
# Branches in threads of their own ask at the same moment who the step above them is. Each handle has a lock of its own,
# since the program's span processors run under it; they may wait for whatever they like, so patience ends as well.
_identifying: Final[dict[int, threading.RLock]] = {}
_PATIENCE_S: Final = 1.0


def _after_fork_in_child() -> None:
    _identifying.clear()  # the threads that hold them are not in this process
    _ids.seed()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _read_current() -> Callable[[], Context]:
    token = context_api.attach(context_api.get_current())
    context_api.detach(token)
    # The variable itself, where there is one: OpenTelemetry's function for it is three calls deep.
    return token.var.get if isinstance(token, Token) else context_api.get_current


current_context: Final = _read_current()
"""The current OpenTelemetry context."""


def now_ns() -> int:
    """Nanoseconds since the epoch by a clock that never steps within the process."""
    return _CLOCK_OFFSET_NS + time.perf_counter_ns()


class Outcome(Enum):
    """How something ended that neither returned nor failed."""

    CANCELLED = "cancelled"
    ABANDONED = "abandoned"
    INTERRUPTED = "interrupted"


class Handle:
    """One thing that runs: a workflow, agent, tool, step or LLM call.

    It gets its identity when somebody needs it (a child, a header to send, the OpenTelemetry context) or at its end.
    With a tracer it becomes a span of that tracer; without one it is handed to the recorder's sink when it has ended.
    Only open handles can end, and only once; later ends are ignored.
    """

    __slots__ = (
        "_context", "_given", "_span", "attributes", "end_ns", "exchange", "failed", "first_ns", "held", "key", "kind",
        "last_ns", "live", "name", "outer", "parent", "parent_id", "recorder", "role", "span_id", "start_ns",
        "trace_id",
    )  # fmt: skip

    def __init__(
        self,
        recorder: Recorder,
        kind: str,
        name: str,
        *,
        key: object,
        parent: Handle | None,
        outer: Context | None,
        role: str,
        attributes: dict[str, Attribute],
        start_ns: int,
    ) -> None:
        self.recorder = recorder
        self.kind = kind
        self.name = name
        self.key: object = next(_keys) if key is None else key
        self.parent = parent
        self.outer = outer
        self.role = role
        self.attributes = attributes
        self.start_ns = start_ns
        self.end_ns = 0
        self.live = True
        self.failed = False
        self.held = False
        """Whether code is running below it that will end it, however long that takes."""
        self.first_ns: int | None = None
        """When the first piece of a streamed answer came."""
        self.last_ns: int | None = None
        """When the last piece of a streamed answer came."""
        self.exchange: object | None = None
        """The HTTP exchange that carries this call, where one was seen."""
        self.trace_id = 0
        self.span_id = 0
        self.parent_id = 0
        self._span: Span | None = None
        self._given: dict[str, Attribute] = {}
        """What its span was started with: the rest is set when it ends."""
        self._context: Context | None = None

    def identify(self) -> None:
        """Give it its identity, and with a tracer its span, unless it has them."""
        if self.span_id:
            return
        lock = _identifying.setdefault(id(self), threading.RLock())
        is_held = lock.acquire(timeout=_PATIENCE_S)
        try:
            self._identify()
        finally:
            if is_held:
                lock.release()
            _identifying.pop(id(self), None)

    def _identify(self) -> None:
        if self.span_id:
            return
        recorder = self.recorder
        if recorder.tracer is not None:
            parent = self.outer
            if parent is None:
                parent = recorder.root_context if self.parent is None else self.parent.context
            self._given = dict(self.attributes)
            self._span = recorder.tracer.start_span(
                self.name,
                context=parent,
                kind=SpanKind.CLIENT if self.kind == semconv.KIND_LLM else SpanKind.INTERNAL,
                attributes=self._given,
                start_time=self.start_ns,
                record_exception=False,
                set_status_on_exception=False,
            )
            identity = self._span.get_span_context()
            self.trace_id, self.span_id = identity.trace_id, identity.span_id
            return
        if self.parent is not None:  # whatever lies between goes elsewhere, and would leave a gap
            self.parent.identify()
            self.trace_id, self.parent_id = self.parent.trace_id, self.parent.span_id
        elif self.outer is None:
            self.trace_id, self.parent_id = recorder.root_identity
        else:
            identity = trace.get_current_span(self.outer).get_span_context()
            self.trace_id, self.parent_id = identity.trace_id, identity.span_id
        self.trace_id = self.trace_id or _ids.getrandbits(128)
        self.span_id = _ids.getrandbits(64) or 1

    @property
    def span(self) -> Span:
        """Its OpenTelemetry span; without a tracer, one that only identifies it."""
        self.identify()
        if self._span is None:
            self._span = _Identified(self.trace_id, self.span_id)
        return self._span

    @property
    def context(self) -> Context:
        """An OpenTelemetry context in which this handle and its span are the current ones."""
        if self._context is None:
            self._context = self.within(current_context())
        return self._context

    def within(self, context: Context) -> Context:
        """`context`, with this handle and its span as the current ones."""
        return Context({**context, HANDLE_KEY: self, SPAN_KEY: self.span})

    @property
    def _is_traced(self) -> bool:
        """Whether a tracer has started its span; else it goes to the recorder's sink."""
        return self._span is not None and not isinstance(self._span, _Identified)

    def is_span(self, span: Span) -> bool:
        """Whether `span` is this handle's."""
        return span is self._span

    @property
    def accepting(self) -> bool:
        """Whether an HTTP request made now, below this LLM call, is what carries it."""
        return self.kind == semconv.KIND_LLM and self.live and self.first_ns is None and self.exchange is None

    def become_step(self) -> bool:
        """Another call starts below this LLM call: it only wraps that one, unless it has sent a request of its own."""
        if self.exchange is not None or self.first_ns is not None or (self.span_id and self.recorder.tracer):
            return False
        self.kind = semconv.KIND_STEP
        self.attributes = {semconv.KIND: semconv.KIND_STEP}
        return True

    def restart(self, name: str, start_ns: int) -> None:
        """Its request goes out only now, under this name: what came before was the framework's preparation."""
        if not self.span_id:
            self.name = name
            self.start_ns = start_ns

    def received(self) -> None:
        """A piece of a streamed answer has come."""
        self.last_ns = now_ns()
        if self.first_ns is None:
            self.first_ns = self.last_ns

    def end(
        self, *, error: BaseException | None = None, outcome: Outcome | None = None, end_ns: int | None = None
    ) -> None:
        """End it, unless it has ended.

        An `error` without an `outcome` marks the span as failed: with the error's type, never its text, which may
        quote a prompt.
        """
        self.live = False
        still_open = self.recorder.open
        # Frameworks may call two runs the same.
        if still_open.get(self.key) is not self or still_open.pop(self.key, None) is None:
            return
        self.exchange = None  # which refers back: together they would wait for the garbage collector
        attributes = self.attributes
        if error is not None:
            attributes[semconv.ERROR_TYPE] = type(error).__qualname__
            self.failed = outcome is None
        if outcome is not None:
            attributes[semconv.OUTCOME] = outcome.value
        if self.first_ns is not None and semconv.TIME_TO_FIRST_CHUNK_S not in attributes:
            attributes[semconv.TIME_TO_FIRST_CHUNK_S] = (self.first_ns - self.start_ns) / 1e9
            attributes[semconv.REQUEST_STREAM] = True
        self.end_ns = now_ns() if end_ns is None else max(end_ns, self.start_ns)
        self.identify()
        if not self._is_traced or self._span is None:
            self.recorder.sink(self)
        else:  # a span stays with the tracer that has started it, wherever the next ones go
            given = self._given
            later = {name: value for name, value in attributes.items() if given.get(name) != value}
            if later:
                self._span.set_attributes(later)
            if self.failed:
                self._span.set_status(Status(StatusCode.ERROR))
            self._span.end(self.end_ns)

    def traceparent(self) -> Mapping[str, str]:
        """The W3C headers that make a server's spans children of this one."""
        # What OpenTelemetry's propagator writes, without the two contexts that it would be given to read it from.
        self.identify()
        if not self._is_traced:
            return {"traceparent": f"00-{self.trace_id:032x}-{self.span_id:016x}-01"}
        identity = self.span.get_span_context()
        if not identity.is_valid:
            return {}
        headers = {"traceparent": f"00-{identity.trace_id:032x}-{identity.span_id:016x}-{identity.trace_flags:02x}"}
        if identity.trace_state:
            headers["tracestate"] = identity.trace_state.to_header()
        return headers


class _Identified(NonRecordingSpan):
    """The span of a handle without a tracer: its identity, for those who ask for it.

    It does not refer to the handle, which refers to it: together they would wait for the garbage collector.
    """

    def __init__(self, trace_id: int, span_id: int) -> None:
        self._trace_id = trace_id
        self._span_id = span_id

    def get_span_context(self) -> SpanContext:
        """The handle's identity, as OpenTelemetry has it."""
        return SpanContext(self._trace_id, self._span_id, is_remote=False, trace_flags=_SAMPLED)

    def __repr__(self) -> str:
        return f"NonRecordingSpan({self.get_span_context()!r})"


def current_handle() -> Handle | None:
    """The handle that the OpenTelemetry context holds, live or not."""
    found = current_context().get(HANDLE_KEY)
    return found if isinstance(found, Handle) else None


def how_ended(error: BaseException | None) -> Outcome | None:
    """The outcome that an exception stands for, if it is not a failure."""
    if error is None:
        return None
    if isinstance(error, GeneratorExit):
        return Outcome.ABANDONED
    if not isinstance(error, Exception):
        return Outcome.CANCELLED
    # LangGraph's ways to pause for a person or to hand over to a parent graph are exceptions; it need not be installed.
    if any(base.__name__ == "GraphBubbleUp" for base in type(error).__mro__):
        return Outcome.INTERRUPTED
    return None


def attach(handle: Handle) -> object:
    """Make `handle` current; give the result to `detach` in the same thread or task."""
    return context_api.attach(handle.within(current_context()))


def detach(token: object) -> None:
    """Undo `attach`. In another context than that of the attach there is nothing to undo."""
    try:
        token.var.reset(token)  # type: ignore[attr-defined] # OpenTelemetry's tokens are those of contextvars
    except ValueError:
        logger.debug("a context was left in another task or thread than it was entered in")
