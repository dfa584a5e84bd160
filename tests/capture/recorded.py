"""What was captured, in a form that tests can compare."""

from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter


class Recorded:
    """Ended spans, held in memory."""

    def __init__(self):
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    @property
    def spans(self):
        return sorted(self._exporter.get_finished_spans(), key=lambda span: (span.start_time, -span.end_time))

    @property
    def calls(self):
        return [span for span in self.spans if span.attributes.get("scepsy.kind") == "llm"]

    @property
    def call(self):
        (only,) = self.calls
        return only

    def named(self, name):
        (only,) = [span for span in self.spans if span.name == name]
        return only

    def parent(self, span):
        if span.parent is None:
            return None
        (above,) = [other for other in self.spans if other.context.span_id == span.parent.span_id]
        return above

    def path(self, span):
        """Names from the root down to the span."""
        above = self.parent(span)
        return [*([] if above is None else self.path(above)), span.name]

    @property
    def tree(self):
        """Roots as (name, children), children in the order of their starts."""

        def below(span_id):
            return [
                (span.name, below(span.context.span_id))
                for span in self.spans
                if (None if span.parent is None else span.parent.span_id) == span_id
            ]

        return below(None)

    @property
    def roles(self):
        return sorted(call.attributes.get("scepsy.role", "") for call in self.calls)

    def clear(self):
        self._exporter.clear()


def seconds(span):
    return (span.end_time - span.start_time) / 1e9
