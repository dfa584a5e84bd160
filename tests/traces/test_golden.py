"""The same program under every instrumentation gives the same calls."""

from pathlib import Path

import pytest

from scepsy.traces import read_executions
from scepsy.traces.assemble import COPIED_CALL, FAILED_CALL
from scepsy.traces.reading import STARTING

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CALLS = {
    "langchain": [("critic", 50, 12), ("planner", 50, 12), ("writer", 47, 12)],
    "llama_index": [("planner", 50, 12), ("writer", 111, 12)],
    "openai": [
        ("critic", 40, 12), ("embedder", 12, 0), ("planner", 38, 12), ("planner", 40, 12), ("writer", 38, 12),
    ],
}  # fmt: skip
PARTS = {
    "scepsy": {"answer": "langchain", "Engine": "llama_index", "plain client": "openai"},
    "openinference": {"answer": "langchain", "Engine.query": "llama_index", "plain client": "openai"},
    "traceloop": {"answer": "langchain", "Engine": None, "plain client": "openai"},
    "opentelemetry": {
        "answer": "langchain", "chat planner": "llama_index", "chat writer": "llama_index", "plain client": "openai",
    },
    "langfuse": {"answer": "langchain", "plain client": "openai"},
}  # fmt: skip
STREAMED_WITH_TIME_TO_FIRST_TOKEN = {
    "scepsy": 3, "openinference": 3, "traceloop": 0, "opentelemetry": 3, "langfuse": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def readings():
    return {name: read_executions([GOLDEN / f"{name}.jsonl"]) for name in PARTS}


def calls_by_part(name, reading):
    """For each part of the program: (model, tokens in, tokens out) of each call, and its duration, sorted."""
    found = {}
    for execution in reading.executions:
        part = PARTS[name][execution.workflow.removesuffix(".workflow")]
        for span in execution.calls:
            call = (span.call.llm, span.call.input_tokens, span.call.output_tokens)
            found.setdefault(part, []).append((*call, span.duration_s))
    return {part: sorted(calls) for part, calls in found.items()}


@pytest.mark.parametrize("name", sorted(PARTS))
def test_calls_tokens_and_workflows(name, readings):
    reading = readings[name]
    assert reading.dropped == {FAILED_CALL: 1}
    assert reading.repaired == {}
    workflows = sorted(execution.workflow.removesuffix(".workflow") for execution in reading.executions)
    assert workflows == sorted(PARTS[name])
    found = calls_by_part(name, reading)
    assert found.keys() == {part for part in PARTS[name].values() if part}
    for part, calls in found.items():
        assert [call[:3] for call in calls] == CALLS[part]


BESIDE = GOLDEN.parent / "beside"
BOTH = sorted(path.stem for path in BESIDE.glob("*.jsonl"))


@pytest.mark.parametrize("name", BOTH)
def test_two_instrumentations_at_once_tell_of_each_call_once(name):
    """Whole spans of both, of one provider: as a collector gets them."""
    reading = read_executions([BESIDE / f"{name}.jsonl"])
    assert reading.dropped[COPIED_CALL] > 0
    assert reading.dropped[FAILED_CALL] == 1
    found = calls_by_part("scepsy", reading)
    assert {part: [call[:3] for call in calls] for part, calls in found.items()} == CALLS


@pytest.mark.parametrize("name", sorted(PARTS))
def test_durations_are_those_of_our_own_capture(name, readings):
    """Within 1 % or 1 ms."""
    ours = calls_by_part("scepsy", readings["scepsy"])
    for part, calls in calls_by_part(name, readings[name]).items():
        assert [call[3] for call in calls] == pytest.approx([call[3] for call in ours[part]], rel=0.01, abs=0.001)


@pytest.mark.parametrize("name", sorted(PARTS))
def test_time_to_first_token(name, readings):
    times = [
        span.call.time_to_first_token_s
        for execution in readings[name].executions
        for span in execution.calls
        if span.call.time_to_first_token_s is not None
    ]
    assert len(times) == STREAMED_WITH_TIME_TO_FIRST_TOKEN[name]
    assert times == pytest.approx([0.4] * len(times), abs=0.02)


@pytest.mark.parametrize("name", sorted(PARTS))
def test_what_runs_at_once(name, readings):
    """Two pairs of calls overlap: two models asked by a chain, and two by the asynchronous client."""
    for execution in readings[name].executions:
        spans = execution.calls
        overlaps = sum(
            one.start_s < other.end_s and other.start_s < one.end_s
            for index, one in enumerate(spans)
            for other in spans[:index]
        )
        part = PARTS[name][execution.workflow.removesuffix(".workflow")]
        assert overlaps == {"langchain": 1, "openai": 1}.get(part, 0)


def test_roles_are_not_the_names_of_framework_parts(readings):
    roles = {
        span.call.role for reading in readings.values() for execution in reading.executions for span in execution.calls
    }
    assert roles <= {"answer", "Engine", "Engine.custom_query", "plain client", ""}


ENGINE = GOLDEN.parent / "engine"


def test_spans_of_a_real_vllm_join_their_clients_calls():
    """By their trace where the context was passed on, else by the id of the response; the engine's start goes."""
    reading = read_executions([ENGINE])
    assert reading.dropped == {STARTING: 12}
    assert reading.repaired == {}
    assert sorted(execution.workflow for execution in reading.executions) == ["context lost", "context passed on"]
    alone = {
        span.id: span for execution in read_executions([ENGINE / "client.jsonl"]).executions for span in execution.calls
    }
    for execution in reading.executions:
        calls = execution.calls
        assert [(span.call.llm, span.call.input_tokens, span.call.output_tokens) for span in calls] == [
            ("small", 27, 12), ("small", 27, 12), ("small", 27, 12), ("small", 5, 12),
        ]  # fmt: skip
        for span in calls:
            client = alone[span.id]
            assert (span.duration_s, client.call.queue_s) == (client.duration_s, None)
            assert 0 < span.call.queue_s < span.call.time_to_first_token_s < span.duration_s


def test_spans_of_a_real_vllm_alone_are_calls():
    reading = read_executions([ENGINE / "engine.jsonl"])
    calls = [span.call for execution in reading.executions for span in execution.calls]
    assert len(reading.executions) == 5
    assert sorted((call.llm, call.input_tokens, call.output_tokens) for call in calls) == [
        *[("small", 5, 12)] * 2, *[("small", 27, 12)] * 6,
    ]  # fmt: skip
