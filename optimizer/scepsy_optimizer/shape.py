"""The shape of an execution: how wide it fans out, how many calls wait for each other, how deep it calls itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from scepsy_optimizer.executions import Execution, Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of one execution: `width` is the most calls that ran at once, `depth` the most calls one after another.

    `recursion` is how often one agent, tool or workflow occurs on the way from the root to a span, at most: 1 where
    nothing calls itself. `rounds` is how often the most repeated agent, tool or step ran one time after another.
    """

    width: int
    depth: int
    recursion: int
    rounds: int


def shape_of(execution: Execution) -> Shape:
    """Measure an execution."""
    calls = [(span.start_s, span.end_s) for span in execution.calls]
    groups: dict[tuple[str | None, str, str], list[tuple[float, float]]] = {}
    # Names on the way from the root, as counts, shared along a path: a copy is made only where a name is added.
    above: dict[str, dict[tuple[str, str], int]] = {}
    recursion = 1
    for span in execution.spans:
        counts = above.get(span.parent, {}) if span.parent is not None else {}
        if span.call is None:
            groups.setdefault((span.parent, span.kind, span.name), []).append((span.start_s, span.end_s))
            if span.kind in ("workflow", "agent", "tool"):
                key = (span.kind, span.name)
                counts = {**counts, key: counts.get(key, 0) + 1}
                recursion = max(recursion, counts[key])
        above[span.id] = counts
    return Shape(
        width=_most_at_once(calls),
        depth=_most_in_a_row(calls),
        recursion=recursion,
        rounds=max((_most_in_a_row(found) for found in groups.values()), default=0),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bursts:
    """How the calls of one LLM start in one execution: bursts are calls that start together.

    `number` of them, the sum of their squared sizes, and the sum over bursts of `beside_tokens`: the computed prompt
    tokens of all but one of its calls, whichever that is, in whole tokens.
    """

    number: int
    squares: int
    beside_tokens: int


def bursts_of(spans: Iterable[Span]) -> Bursts:
    """The bursts among the calls of one LLM in one execution.

    A call belongs to a burst that starts before the first call of it has run a tenth of its time.
    """
    found: list[list[int]] = []
    until_s = float("-inf")
    for span in sorted(spans, key=lambda span: span.start_s):
        if span.start_s > until_s:
            found.append([])
            until_s = span.start_s + span.duration_s / 10
        computed = 1 if span.call is None else span.call.input_tokens - span.call.cached_tokens
        found[-1].append(max(1, computed))
    return Bursts(
        number=len(found),
        squares=sum(len(tokens) ** 2 for tokens in found),
        beside_tokens=sum(sum(tokens) * (len(tokens) - 1) // len(tokens) for tokens in found),
    )


def _most_at_once(intervals: list[tuple[float, float]]) -> int:
    running = most = 0
    # Ends come before starts at the same moment: what begins when another ends does not overlap it.
    edges = sorted([(end, 0) for _, end in intervals] + [(start, 1) for start, _ in intervals])
    for _, is_start in edges:
        running += 1 if is_start else -1
        most = max(most, running)
    return most


def _most_in_a_row(intervals: list[tuple[float, float]]) -> int:
    """Size of the largest set of intervals of which none overlap: by the greedy choice of what ends first."""
    found, free_s = 0, float("-inf")
    for start, end in sorted(intervals, key=lambda interval: interval[1]):
        if start >= free_s:
            found += 1
            free_s = end
    return found
