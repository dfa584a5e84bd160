"""Executions: what was captured of one run of a workflow, as plain values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One LLM request that reached an engine. Retries, cache hits and wrapper spans are not calls.

    `input_tokens` includes `cached_tokens` (those served from the prefix cache).
    """

    llm: str
    role: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    time_to_first_token_s: float | None = None
    queue_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A timed piece of an execution: a call of an LLM, or a step around calls (workflow, agent, tool).

    Times are seconds since the start of the execution. A span with a `call` has no children.
    """

    id: str
    parent: str | None
    name: str
    kind: str
    start_s: float
    end_s: float
    call: Call | None = None

    @property
    def duration_s(self) -> float:
        """Time from start to end."""
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """One run of a workflow: a tree of spans with exactly one root, `spans[0]`, every parent before its children.

    `started_ns` is the moment of its start in nanoseconds since the epoch, 0 where nobody knows.
    """

    id: str
    workflow: str
    spans: tuple[Span, ...]
    started_ns: int = 0

    @property
    def makespan_s(self) -> float:
        """Wall time of the root."""
        return self.spans[0].duration_s

    @property
    def calls(self) -> tuple[Span, ...]:
        """The spans that are calls of an LLM, in the order of their listing."""
        return tuple(span for span in self.spans if span.call is not None)
