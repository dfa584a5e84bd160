"""Exports of Langfuse: a trace with its observations, as its interface and API give it, or a list of observations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from scepsy.traces.dialects import langfuse
from scepsy.traces.records import RawSpan, Tally
from scepsy.traces.times import parse_time_ns

BROKEN: Final = "observations without an id, a trace or a start"


def recognises(value: object) -> bool:
    """Whether a parsed JSON value is a trace with observations, or one observation."""
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("observations"), list) or ("traceId" in value and "startTime" in value)


def spans(value: Mapping[str, Any], tally: Tally) -> Iterator[RawSpan]:
    """The observations as spans in Langfuse's dialect."""
    if not isinstance(value.get("observations"), list):
        yield from _observation(value, "", tally)
        return
    inner = value.get("trace")
    trace = inner if isinstance(inner, dict) else value
    name = trace.get("name")
    for observation in value["observations"]:
        if isinstance(observation, dict):
            yield from _observation(observation, name if isinstance(name, str) else "", tally)
        else:
            tally.spans += 1
            tally.dropped[BROKEN] += 1


def _observation(observation: Mapping[str, Any], workflow: str, tally: Tally) -> Iterator[RawSpan]:
    tally.spans += 1
    own, trace = observation.get("id"), observation.get("traceId")
    parent, name = observation.get("parentObservationId"), observation.get("name")
    start_ns = parse_time_ns(observation.get("startTime"))
    if not (isinstance(own, str) and isinstance(trace, str) and own and trace and start_ns):
        tally.dropped[BROKEN] += 1
        return
    kind = observation.get("type")
    end_ns = parse_time_ns(observation.get("endTime"))
    yield RawSpan(
        trace,
        own,
        parent if isinstance(parent, str) else "",
        name if isinstance(name, str) else "",
        start_ns,
        start_ns if kind == "EVENT" else end_ns,
        "langfuse-export",
        {
            langfuse.TYPE: kind,
            langfuse.MODEL: observation.get("model") or observation.get("providedModelName"),
            langfuse.USAGE: observation.get("usageDetails") or observation.get("usage"),
            langfuse.FIRST_CHUNK_AT: observation.get("completionStartTime"),
            langfuse.LEVEL: observation.get("level"),
            langfuse.METADATA: observation.get("metadata"),
            langfuse.TRACE_NAME: workflow if not parent else "",
        },
        {},
    )
