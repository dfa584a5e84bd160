"""What is running now, as a graph of light handles, each of which becomes one OpenTelemetry span when it ends.

Frameworks tell of starts and ends in callbacks, where the OpenTelemetry context cannot be attached and detached safely.
So parents are found, not inherited: among all that is live around a new call, what started last is its parent, because
all of them are its ancestors.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any, Final

from opentelemetry import context as context_api
from opentelemetry import trace
from opentelemetry.context.context import Context
from opentelemetry.trace import Span, Tracer, TracerProvider

from scepsy import semconv
from scepsy.capture.handle import (
    HANDLE_KEY,
    PROPAGATOR,
    SPAN_KEY,
    Attribute,
    Handle,
    Outcome,
    current_context,
    now_ns,
)

Source = Callable[[], Handle | None]
Sink = Callable[[Handle], None]

SCOPE: Final = "scepsy"
"""Name of the instrumentation scope of every span that Scepsy makes."""

# OpenTelemetry's own switch, by which exporters and users mute instrumentation for a while.
SUPPRESS_KEY: Final[str] = getattr(context_api, "_SUPPRESS_INSTRUMENTATION_KEY", "suppress_instrumentation")

_OPERATIONS: Final = {
    semconv.KIND_WORKFLOW: (semconv.INVOKE_WORKFLOW, semconv.WORKFLOW_NAME),
    semconv.KIND_AGENT: (semconv.INVOKE_AGENT, semconv.AGENT_NAME),
    semconv.KIND_TOOL: (semconv.EXECUTE_TOOL, semconv.TOOL_NAME),
}


class Recorder:
    """All that is running in this process, and where its spans go.

    `limit` and `max_age_s` bound what is remembered of calls whose end never comes: the oldest are then ended and
    marked as abandoned. What has something open below it, or code running in it, is not among them.
    """

    def __init__(
        self, provider: TracerProvider | None = None, *, limit: int = 100_000, max_age_s: float = 3600.0
    ) -> None:
        self.open: dict[object, Handle] = {}
        self.sources: list[Source] = []
        self.limit = limit
        self.max_age_s = max_age_s
        self.root_context = Context()
        self.root_identity = (0, 0)
        """Trace and span of the process that started this one, if it left a TRACEPARENT."""
        self.tracer: Tracer | None = None
        self.sink: Sink = _nowhere
        self._until_sweep = 1024
        self._is_full = False
        """Whether more than `limit` are open, none of which may be ended."""
        self.use(provider)

    def use(self, provider: TracerProvider | None = None, *, sink: Sink | None = None) -> None:
        """Make spans with `provider` from now on, or hand every handle that has ended to `sink`.

        Without either, the provider is the one that OpenTelemetry's API names global. A sink costs a tenth of a span.
        """
        if sink is None:
            self.tracer = trace.get_tracer(SCOPE, version("scepsy"), tracer_provider=provider)
            self.sink = _nowhere
        else:
            self.tracer = None
            self.sink = sink

    def adopt_environment(self) -> None:
        """Continue the trace of the process that started this one, if it left a TRACEPARENT."""
        carrier = {name.lower(): os.environ[name] for name in ("TRACEPARENT", "TRACESTATE") if name in os.environ}
        self.root_context = PROPAGATOR.extract(carrier, Context())
        identity = trace.get_current_span(self.root_context).get_span_context()
        self.root_identity = (identity.trace_id, identity.span_id)

    def around(
        self, given: Handle | None = None, *, without: Source | None = None
    ) -> tuple[Handle | None, Context | None]:
        """The live handle around the caller that started last, and a context if somebody else's span lies between.

        `given` is what the framework itself names as the parent; the source `without` is not asked.
        """
        context = current_context()
        best = _nearest_live(given)
        mine: Any = context.get(HANDLE_KEY)
        # What is attached is around the caller even if it has ended: a task that outlives its workflow is still its.
        if mine is not None and (best is None or mine.start_ns > best.start_ns):
            best = mine
        for source in self.sources:
            if source is without:
                continue
            found = source()
            while found is not None and not found.live:
                found = found.parent
            if found is not None and (best is None or found.start_ns > best.start_ns):
                best = found
        span = context.get(SPAN_KEY)
        if span is None or (mine is not None and mine.is_span(span)):
            return best, None
        if not isinstance(span, Span) or not span.get_span_context().is_valid:
            return best, None
        started_ns = getattr(span, "start_time", None)
        if best is None:
            return None, context
        # Another instrumentation keeps traces of its own: its spans lie beside what is ours, not below it.
        if started_ns is not None and started_ns > best.start_ns and span.get_span_context().trace_id == _trace(best):
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
        if self._until_sweep <= 0 or (len(self.open) > self.limit and not self._is_full):
            self.sweep()
        return handle

    def sweep(self) -> None:
        """End, as abandoned, the oldest open handles beyond the limits."""
        self._until_sweep = 1024
        oldest_ns = now_ns() - int(self.max_age_s * 1e9)
        handles = list(self.open.values())
        # Looking through all of them takes long: it makes room for more than one.
        enough = self.limit - self.limit // 100 if len(handles) > self.limit else self.limit
        if len(handles) > enough or (handles and handles[0].start_ns <= oldest_ns):
            needed = _ancestors(handles)
            for handle in handles[:-1]:  # the last has only just begun
                if len(self.open) <= enough and handle.start_ns > oldest_ns:
                    break
                if not handle.held and id(handle) not in needed:
                    handle.end(outcome=Outcome.ABANDONED, end_ns=handle.last_ns)
        self._is_full = len(self.open) > self.limit

    def forget(self) -> None:
        """Let go of everything open without ending it: it belongs to the process that this one was forked from."""
        self.open.clear()


def _ancestors(handles: Iterable[Handle]) -> set[int]:
    """The identities of everything above these."""
    found: set[int] = set()
    for handle in handles:
        above = handle.parent
        while above is not None and id(above) not in found:
            found.add(id(above))
            above = above.parent
    return found


def _nowhere(handle: Handle) -> None:
    """What becomes of handles where nobody has asked for them."""


def _trace(handle: Handle | None) -> int:
    """The trace that a handle is in; 0 while nobody has needed to know."""
    while handle is not None and not handle.trace_id:
        if handle.outer is not None:
            return trace.get_current_span(handle.outer).get_span_context().trace_id
        handle = handle.parent
    return 0 if handle is None else handle.trace_id


def _nearest_live(handle: Handle | None) -> Handle | None:
    while handle is not None and not handle.live:
        handle = handle.parent
    return handle


def muted() -> bool:
    """Whether instrumentation is muted in the current OpenTelemetry context."""
    return bool(current_context().get(SUPPRESS_KEY))


recorder: Final = Recorder()
"""The process's own recorder."""

_POOLS: Final = frozenset({"concurrent.futures.process", "multiprocessing.pool"})


def _after_fork_in_child() -> None:
    recorder.forget()
    # What kind of process this is multiprocessing knows only a moment later.
    processes = sys.modules.get("multiprocessing.util")
    if processes is not None:
        processes.register_after_fork(recorder, _leave_workflow_of_pool)


def _leave_workflow_of_pool(_recorder: Recorder) -> None:
    """A pool's worker serves all who come, not only the workflow for which the pool was first used."""
    from multiprocessing import current_process

    target = getattr(current_process(), "_target", None)
    if getattr(target, "__module__", "") in _POOLS:
        context_api.attach(Context())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
