"""What is running now, as a graph of light handles, each of which becomes one OpenTelemetry span when it ends.

Frameworks tell of starts and ends in callbacks, where the OpenTelemetry context cannot be attached and detached safely.
So parents are found, not inherited: among all that is live around a new call, what started last is its parent, because
all of them are its ancestors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import version
from typing import Final

from opentelemetry import context as context_api
from opentelemetry import trace
from opentelemetry.context.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from scepsy import semconv
from scepsy.capture.safety import logger

Attribute = str | bool | int | float
Source = Callable[[], "Handle | None"]

SCOPE: Final = "scepsy"
"""Name of the instrumentation scope of every span that Scepsy makes."""

_HANDLE_KEY: Final = context_api.create_key("scepsy-handle")
# OpenTelemetry's own switch, by which exporters and users mute instrumentation for a while.
_SUPPRESS_KEY: Final[str] = getattr(context_api, "_SUPPRESS_INSTRUMENTATION_KEY", "suppress_instrumentation")
# Wall time that neither jumps nor runs backwards while this process lives: durations must be right first of all.
_CLOCK_OFFSET_NS: Final = time.time_ns() - time.perf_counter_ns()

_OPERATIONS: Final = {
    semconv.KIND_WORKFLOW: (semconv.INVOKE_WORKFLOW, semconv.WORKFLOW_NAME),
    semconv.KIND_AGENT: (semconv.INVOKE_AGENT, semconv.AGENT_NAME),
    semconv.KIND_TOOL: (semconv.EXECUTE_TOOL, semconv.TOOL_NAME),
}


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

    Its span is made when somebody needs its identity (a child, a header to send, the OpenTelemetry context) or at its
    end. Only open handles can end, and only once; later ends are ignored.
    """

    __slots__ = (
        "_context", "_span", "attributes", "exchange", "first_ns", "key", "kind", "last_ns", "live", "name", "outer",
        "parent", "recorder", "role", "start_ns",
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
        self.key: object = self if key is None else key
        self.parent = parent
        self.outer = outer
        self.role = role
        self.attributes = attributes
        self.start_ns = start_ns
        self.live = True
        self.first_ns: int | None = None
        """When the first piece of a streamed answer came."""
        self.last_ns: int | None = None
        """When the last piece of a streamed answer came."""
        self.exchange: object | None = None
        """The HTTP exchange that carries this call, where one was seen."""
        self._span: Span | None = None
        self._context: Context | None = None

    @property
    def span(self) -> Span:
        """Its OpenTelemetry span, made now if it was not needed before."""
        if self._span is None:
            parent = self.outer
            if parent is None:
                parent = self.recorder.root_context if self.parent is None else self.parent.context
            self._span = self.recorder.tracer.start_span(
                self.name,
                context=parent,
                kind=SpanKind.CLIENT if self.kind == semconv.KIND_LLM else SpanKind.INTERNAL,
                attributes=self.attributes,
                start_time=self.start_ns,
                record_exception=False,
                set_status_on_exception=False,
            )
            self.attributes = {}
        return self._span

    @property
    def context(self) -> Context:
        """An OpenTelemetry context in which this handle and its span are the current ones."""
        if self._context is None:
            self._context = context_api.set_value(_HANDLE_KEY, self, trace.set_span_in_context(self.span))
        return self._context

    @property
    def accepting(self) -> bool:
        """Whether an HTTP request made now, below this LLM call, is what carries it."""
        return self.kind == semconv.KIND_LLM and self.live and self.first_ns is None and self.exchange is None

    def become_step(self) -> bool:
        """Another call starts below this LLM call: it only wraps that one, unless it has sent a request of its own."""
        if self.exchange is not None or self._span is not None or self.first_ns is not None:
            return False
        self.kind = semconv.KIND_STEP
        self.attributes = {semconv.KIND: semconv.KIND_STEP}
        return True

    def restart(self, name: str, start_ns: int) -> None:
        """Its request goes out only now, under this name: what came before was the framework's preparation."""
        if self._span is None:
            self.name = name
            self.start_ns = start_ns

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make it the parent of what runs inside the block."""
        token = attach(self)
        try:
            yield
        finally:
            detach(token)

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
        recorder = self.recorder
        if recorder.open.get(self.key) is not self or recorder.open.pop(self.key, None) is not self:
            self.live = False
            return
        self.live = False
        attributes = self.attributes
        if error is not None:
            attributes[semconv.ERROR_TYPE] = type(error).__qualname__
        if outcome is not None:
            attributes[semconv.OUTCOME] = outcome.value
        if self.first_ns is not None and semconv.TIME_TO_FIRST_CHUNK_S not in attributes and self.exchange is None:
            attributes[semconv.TIME_TO_FIRST_CHUNK_S] = (self.first_ns - self.start_ns) / 1e9
            attributes[semconv.REQUEST_STREAM] = True
        if self._span is not None and attributes:
            self._span.set_attributes(attributes)
        span = self.span
        if error is not None and outcome is None:
            span.set_status(Status(StatusCode.ERROR))
        span.end(now_ns() if end_ns is None else max(end_ns, self.start_ns))

    def traceparent(self) -> Mapping[str, str]:
        """The W3C headers that make a server's spans children of this one."""
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, self.context)
        return carrier


_propagator = TraceContextTextMapPropagator()


class Recorder:
    """All that is running in this process, and where its spans go.

    `limit` and `max_age_s` bound what is remembered of calls whose end never comes: the oldest are then ended and
    marked as abandoned.
    """

    def __init__(
        self, provider: TracerProvider | None = None, *, limit: int = 100_000, max_age_s: float = 3600.0
    ) -> None:
        self.open: dict[object, Handle] = {}
        self.sources: list[Source] = []
        self.limit = limit
        self.max_age_s = max_age_s
        self.root_context = Context()
        self.tracer: Tracer = self.use(provider)
        self._until_sweep = 1024

    def use(self, provider: TracerProvider | None) -> Tracer:
        """Send spans to `provider` from now on; None means the one that OpenTelemetry's API names global."""
        self.tracer = trace.get_tracer(SCOPE, version("scepsy"), tracer_provider=provider)
        return self.tracer

    def adopt_environment(self) -> None:
        """Continue the trace of the process that started this one, if it left a TRACEPARENT."""
        carrier = {name.lower(): os.environ[name] for name in ("TRACEPARENT", "TRACESTATE") if name in os.environ}
        self.root_context = _propagator.extract(carrier, Context())

    def around(
        self, given: Handle | None = None, *, without: Source | None = None
    ) -> tuple[Handle | None, Context | None]:
        """The live handle around the caller that started last, and a context if somebody else's span lies between.

        `given` is what the framework itself names as the parent; the source `without` is not asked.
        """
        context = context_api.get_current()
        best = _nearest_live(given)
        attached = context.get(_HANDLE_KEY)
        mine: Handle | None = attached if isinstance(attached, Handle) else None
        # What is attached is around the caller even if it has ended: a task that outlives its workflow is still its.
        if mine is not None and (best is None or mine.start_ns > best.start_ns):
            best = mine
        for source in self.sources:
            if source is without:
                continue
            found = _nearest_live(source())
            if found is not None and (best is None or found.start_ns > best.start_ns):
                best = found
        span = trace.get_current_span(context)
        if span is trace.INVALID_SPAN or (mine is not None and span is mine._span):  # noqa: SLF001 - own module
            return best, None
        if not span.get_span_context().is_valid:
            return best, None
        started_ns = getattr(span, "start_time", None)
        if best is None or (started_ns is not None and started_ns > best.start_ns):
            return best, context
        return best, None

    def start(
        self,
        kind: str,
        name: str,
        *,
        operation: str = "",
        key: object = None,
        parent: Handle | None = None,
        named: bool = True,
    ) -> Handle:
        """Start something below what is around the caller, or below `parent` if that started later.

        `key` finds it again in `open`. A step that is not `named` gives its calls no role of its own. For an LLM call
        `name` is the model.
        """
        best, outer = self.around(parent)
        return self.start_below(best, outer, kind, name, operation=operation, key=key, named=named)

    def start_below(
        self,
        parent: Handle | None,
        outer: Context | None,
        kind: str,
        name: str,
        *,
        operation: str = "",
        key: object = None,
        named: bool = True,
    ) -> Handle:
        """Start something below a known parent; `outer` is a context with somebody else's span in between."""
        wrapper = parent if kind == semconv.KIND_LLM else None
        if wrapper is not None and wrapper.kind == semconv.KIND_LLM and not wrapper.become_step():
            parent, outer = wrapper.parent, wrapper.outer
        attributes: dict[str, Attribute] = {semconv.KIND: kind}
        role = "" if parent is None else parent.role
        title = name
        if kind == semconv.KIND_LLM:
            attributes[semconv.OPERATION] = operation
            title = operation
            if name:
                attributes[semconv.REQUEST_MODEL] = name
                title = f"{operation} {name}"
            if role:
                attributes[semconv.ROLE] = role
        else:
            if kind in _OPERATIONS:
                operation, name_key = _OPERATIONS[kind]
                attributes[semconv.OPERATION] = operation
                attributes[name_key] = name
                title = f"{operation} {name}"
            elif operation:
                attributes[semconv.OPERATION] = operation
            if named:
                role = name
        handle = Handle(
            self, kind, title, key=key, parent=parent, outer=outer, role=role, attributes=attributes, start_ns=now_ns()
        )
        self.open[handle.key] = handle
        self._until_sweep -= 1
        if self._until_sweep <= 0 or len(self.open) > self.limit:
            self.sweep()
        return handle

    def sweep(self) -> None:
        """End, as abandoned, the oldest open handles beyond the limits."""
        self._until_sweep = 1024
        oldest_ns = now_ns() - int(self.max_age_s * 1e9)
        for handle in list(self.open.values()):
            if len(self.open) <= self.limit and handle.start_ns > oldest_ns:
                break
            handle.end(outcome=Outcome.ABANDONED, end_ns=handle.last_ns)

    def forget(self) -> None:
        """Let go of everything open without ending it: it belongs to the process that this one was forked from."""
        self.open.clear()


def _nearest_live(handle: Handle | None) -> Handle | None:
    while handle is not None and not handle.live:
        handle = handle.parent
    return handle


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


def muted() -> bool:
    """Whether instrumentation is muted in the current OpenTelemetry context."""
    return bool(context_api.get_value(_SUPPRESS_KEY))


def attach(handle: Handle) -> object:
    """Make `handle` current; give the result to `detach` in the same thread or task."""
    context = context_api.get_current()
    return context_api.attach(
        context_api.set_value(_HANDLE_KEY, handle, trace.set_span_in_context(handle.span, context))
    )


def detach(token: object) -> None:
    """Undo `attach`. In another context than that of the attach there is nothing to undo."""
    try:
        token.var.reset(token)  # type: ignore[attr-defined] # OpenTelemetry's tokens are those of contextvars
    except ValueError:
        logger.debug("a context was left in another task or thread than it was entered in")


recorder: Final = Recorder()
"""The process's own recorder."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=recorder.forget)
