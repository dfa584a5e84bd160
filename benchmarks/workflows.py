"""Made-up workflows for benchmarks: random executions in the shape of agents that people run.

Durations in the trace are those of an idle device, roughly; what matters is who waits for whom, and the token lengths.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from scepsy_optimizer.executions import Call, Execution, Span


class Recorder:
    """Writes down one execution: steps and calls with a clock of its own."""

    def __init__(self, name: str, workflow: str) -> None:
        """An execution that has just begun."""
        self._name = name
        self._workflow = workflow
        self._spans: list[Span] = []

    def call(self, parent: str, start_s: float, llm: str, tokens_in: int, tokens_out: int, role: str = "") -> float:
        """One call; returns its end."""
        end_s = start_s + 0.01 + tokens_in * 2e-5 + tokens_out * 7e-3
        self._spans.append(
            Span(
                id=f"s{len(self._spans)}",
                parent=parent,
                name=llm,
                kind="llm",
                start_s=start_s,
                end_s=end_s,
                call=Call(llm=llm, role=role, input_tokens=tokens_in, output_tokens=tokens_out),
            )
        )
        return end_s

    def step(self, parent: str, name: str, start_s: float) -> str:
        """A step whose end is not known yet; returns its id, to be given to `end`."""
        self._spans.append(
            Span(id=f"s{len(self._spans)}", parent=parent, name=name, kind="agent", start_s=start_s, end_s=start_s)
        )
        return self._spans[-1].id

    def end(self, step: str, end_s: float) -> None:
        """A step ends."""
        index = next(i for i, span in enumerate(self._spans) if span.id == step)
        old = self._spans[index]
        self._spans[index] = Span(
            id=old.id, parent=old.parent, name=old.name, kind=old.kind, start_s=old.start_s, end_s=end_s
        )

    def finish(self, end_s: float) -> Execution:
        """The execution, its root ending then."""
        root = Span(id="root", parent=None, name=self._workflow, kind="workflow", start_s=0.0, end_s=end_s)
        return Execution(id=self._name, workflow=self._workflow, spans=(root, *self._spans))


def lengths(rng: random.Random, median: float, sigma: float = 0.5) -> int:
    """A token length, lognormal."""
    return max(1, min(8000, round(rng.lognormvariate(0, sigma) * median)))


def beam_search(rng: random.Random, name: str) -> Execution:
    """Rounds of parallel generator and verifier pairs, until one is accepted."""
    run, now_s = Recorder(name, "beam-search"), 0.0
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4, 6))):
        ends = []
        for _ in range(rng.choice((3, 4, 6))):
            branch = run.step("root", "extend", now_s)
            end_s = run.call(branch, now_s, "generator", lengths(rng, 300), lengths(rng, 120))
            end_s = run.call(branch, end_s, "verifier", lengths(rng, 400), rng.randint(1, 8))
            run.end(branch, end_s)
            ends.append(end_s)
        now_s = max(ends) + 0.002
    return run.finish(now_s)


def retrieval(rng: random.Random, name: str) -> Execution:
    """A search tool, a reranker over all passages at once, sometimes a second round, then the writer."""
    run, now_s = Recorder(name, "retrieval"), 0.0
    for _ in range(rng.choice((1, 1, 1, 2))):
        now_s += rng.lognormvariate(-3, 0.5)
        now_s = max(run.call("root", now_s, "reranker", lengths(rng, 250), 4) for _ in range(rng.randint(6, 12)))
    return run.finish(run.call("root", now_s + 0.01, "writer", lengths(rng, 1500), lengths(rng, 180)))


def map_reduce(rng: random.Random, name: str) -> Execution:
    """Notes on many parts at once, reduced by the writer, one or two levels deep."""
    run, now_s = Recorder(name, "map-reduce"), 0.0
    for _ in range(rng.choice((1, 2))):
        parts = rng.randint(3, 10)
        now_s = max(run.call("root", now_s, "generator", lengths(rng, 800), lengths(rng, 150)) for _ in range(parts))
        now_s = run.call("root", now_s, "writer", 150 * parts, lengths(rng, 200))
    return run.finish(now_s)


def tool_agent(rng: random.Random, name: str) -> Execution:
    """One agent in a loop: a call with a growing context, then a tool that takes its time."""
    run, now_s, context = Recorder(name, "tool-agent"), 0.0, lengths(rng, 900)
    for _ in range(rng.randint(2, 10)):
        out = lengths(rng, 60)
        now_s = run.call("root", now_s, "generator", context, out) + rng.lognormvariate(-0.5, 0.8)
        context = min(8000, context + out + lengths(rng, 200))
    return run.finish(run.call("root", now_s, "generator", context, lengths(rng, 200)))


def two_llms_at_once(rng: random.Random, name: str) -> Execution:
    """Fan-out over two different LLMs whose answers are compared by a third."""
    run, now_s = Recorder(name, "two-llms-at-once"), 0.0
    for _ in range(rng.randint(1, 3)):
        ends = [
            run.call("root", now_s, "generator", lengths(rng, 500), lengths(rng, 200)),
            run.call("root", now_s, "writer", lengths(rng, 500), lengths(rng, 80)),
        ]
        now_s = run.call("root", max(ends), "verifier", lengths(rng, 600), lengths(rng, 20))
    return run.finish(now_s)


def two_roles(rng: random.Random, name: str) -> Execution:
    """One LLM that plans briefly over a long context and then writes at length, in parallel sections."""
    run = Recorder(name, "two-roles")
    now_s = run.call("root", 0.0, "writer", lengths(rng, 3000), lengths(rng, 20, 0.3), role="planner")
    sections = rng.randint(1, 4)
    ends = [run.call("root", now_s, "writer", lengths(rng, 300), lengths(rng, 250), "author") for _ in range(sections)]
    return run.finish(run.call("root", max(ends), "verifier", 200 * sections, 8))


def debate(rng: random.Random, name: str) -> Execution:
    """Two sides that answer each other, each step a nested agent with a quick check of its own."""
    run, now_s = Recorder(name, "debate"), 0.0
    for _ in range(rng.randint(1, 4)):
        ends = []
        for _ in range(2):
            side = run.step("root", "side", now_s)
            end_s = run.call(side, now_s, "generator", lengths(rng, 700), lengths(rng, 140))
            end_s = max(run.call(side, end_s, "verifier", lengths(rng, 300), 8) for _ in range(3))
            run.end(side, end_s)
            ends.append(end_s)
        now_s = max(ends)
    return run.finish(run.call("root", now_s, "writer", lengths(rng, 1800), lengths(rng, 120)))


WORKFLOWS: dict[str, Callable[[random.Random, str], Execution]] = {
    "beam-search": beam_search,
    "retrieval": retrieval,
    "map-reduce": map_reduce,
    "tool-agent": tool_agent,
    "two-llms-at-once": two_llms_at_once,
    "two-roles": two_roles,
    "debate": debate,
}
