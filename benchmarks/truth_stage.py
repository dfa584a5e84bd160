"""Where the cases of `capture_truth` run: a server that remembers, and what an instrumentation has told of it."""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from scepsy.traces.dialects import normalise
from scepsy.traces.records import CALL, LLM, Event, RawSpan, SpanRecord

TOLERANCE_NS: Final = 30_000_000
"""How far a time may be off: the server's thread and the program share what processors there are."""
_LOOPBACK: Final = Path(__file__).resolve().parent.parent / "tests" / "integrations" / "loopback.py"


class WrongError(Exception):
    """What an instrumentation has told is not what happened."""


def expect(right: object, otherwise: str) -> None:
    """Raise WrongError with `otherwise` unless `right`."""
    if not right:
        raise WrongError(otherwise)


def load_loopback() -> Any:
    """The tests' server of OpenAI's API, started."""
    spec = importlib.util.spec_from_file_location("loopback", _LOOPBACK)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(_LOOPBACK)
    module = importlib.util.module_from_spec(spec)
    sys.modules["loopback"] = module
    spec.loader.exec_module(module)
    return module.Loopback().start()


class Stage:
    """One process: its server, and the spans that have ended in it."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.server = load_loopback()

    @property
    def seen(self) -> Sequence[Any]:
        """What the server has seen since `clear`."""
        return tuple(self.server.seen)

    @property
    def url(self) -> str:
        """Where the server listens."""
        return str(self.server.url)

    async def clear(self) -> None:
        """Forget what has happened, once all of it has."""
        await self.settle()
        self._exporter.clear()
        self.server.seen.clear()

    async def settle(self, seconds: float = 0.02) -> None:
        """Let callbacks and finalisers run that are due."""
        gc.collect()
        await asyncio.sleep(seconds)

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        """Everything that has ended, as it was exported."""
        return self._exporter.get_finished_spans()

    @property
    def records(self) -> list[SpanRecord]:
        """Everything that has ended, in one vocabulary, in the order of the starts. Nothing is repaired."""
        return sorted((_record(span) for span in self.spans), key=lambda record: record.start_ns)

    @property
    def llm_spans(self) -> list[SpanRecord]:
        """Every span that says it is a call of a model."""
        return [record for record in self.records if record.kind in (LLM, CALL)]

    @property
    def calls(self) -> list[SpanRecord]:
        """The innermost of them: a framework's span around its client's is not another call."""
        wrappers = {
            (above.trace, above.id) for call in self.llm_spans for above in self.above(call) if above.kind == LLM
        }
        return [record for record in self.llm_spans if (record.trace, record.id) not in wrappers]

    def told(self) -> list[SpanRecord]:
        """The calls, however many spans each has got. Raises WrongError if there is none."""
        expect(self.calls, "0 calls for 1")
        return self.calls

    def above(self, record: SpanRecord) -> list[SpanRecord]:
        """The spans around a span, from the inside out."""
        known = {(other.trace, other.id): other for other in self.records}
        found: list[SpanRecord] = []
        while (parent := known.get((record.trace, record.parent))) is not None and parent not in found:
            found.append(parent)
            record = parent
        return found

    def expect_calls(self) -> list[SpanRecord]:
        """One call for each answer of the server; returns them. Raises WrongError otherwise."""
        calls, count = self.calls, len(self.server.good)
        expect(len(calls) == count, f"{len(calls)} calls for {count}")
        return calls

    def expect_interval(self, call: SpanRecord, seen: Any) -> None:
        """The call lasts from the request to the last piece of the answer. Raises WrongError otherwise."""
        end_ns = seen.last_piece_ns or seen.end_ns
        expect(call.start_ns < seen.start_ns + TOLERANCE_NS, "starts too late")
        late_ms, lasted_ms = (call.end_ns - end_ns) / 1e6, (end_ns - seen.start_ns) / 1e6
        told_ms = (call.end_ns - call.start_ns) / 1e6
        expect(abs(late_ms) < TOLERANCE_NS / 1e6, f"{told_ms:.0f} ms for {lasted_ms:.0f} ms")


def _record(span: ReadableSpan) -> SpanRecord:
    identity, parent = span.get_span_context(), span.parent
    assert identity is not None, "an exported span has its identity"
    return normalise(
        RawSpan(
            trace=format(identity.trace_id, "032x"),
            id=format(identity.span_id, "016x"),
            parent="" if parent is None else format(parent.span_id, "016x"),
            name=span.name,
            start_ns=span.start_time or 0,
            end_ns=span.end_time or 0,
            scope="" if span.instrumentation_scope is None else span.instrumentation_scope.name,
            attributes=dict(span.attributes or {}),
            resource={},
            failed=span.status.status_code.name == "ERROR",
            events=[Event(event.name, event.timestamp) for event in span.events],
        )
    )
