"""Two instrumentations of one process: each call counts once, and calls that truly ran at once all count."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scepsy.traces import read_executions
from scepsy.traces.assemble import COPIED_CALL, COPIED_EXECUTION

PROCESS = {"process.pid": 7, "host.name": "h"}


@pytest.fixture
def both(otlp, tmp_path):
    """Reads our spans and another library's, which lie in one file."""

    def read(ours, theirs, *, other=PROCESS, scope="openinference.instrumentation.langchain"):
        requests = otlp.request(*ours, resource=PROCESS), otlp.request(*theirs, scope=scope, resource=other)
        return read_executions([otlp.write(tmp_path / "both.jsonl", *requests)])

    return read


def total(reading):
    return sum(len(execution.calls) for execution in reading.executions)


def test_beside_each_other_in_one_trace(otlp, both):
    reading = both(
        [otlp.workflow("a", "", "w", 0, 10), otlp.chat("ours", "a", 1, 4)], [otlp.chat("theirs", "a", 0.98, 4.001)]
    )
    (execution,) = reading.executions
    assert [span.id for span in execution.spans] == ["a", "ours"]
    assert reading.dropped == {COPIED_CALL: 1}


def test_a_trace_of_their_own_is_left_out_with_all_its_steps(otlp, both):
    """Their framework's span lies around their client's, and knows the counts only there."""
    ours = [otlp.workflow("a", "", "w", 0, 10), otlp.chat("c", "a", 1, 4)]
    theirs = [
        otlp.workflow("x", "", "w", 0, 10, trace="t2"),
        otlp.chat("y", "x", 0.9, 4.01, trace="t2"),
        otlp.chat("z", "y", 0.999, 4.002, trace="t2", tokens=None),
    ]
    reading = both(ours, theirs)
    assert [execution.id for execution in reading.executions] == ["t1"]
    assert reading.dropped == {COPIED_CALL: 1, COPIED_EXECUTION: 1}


def test_what_only_they_saw_stays(otlp, both):
    ours = [otlp.workflow("a", "", "w", 0, 10), otlp.chat("c", "a", 1, 4)]
    theirs = [
        otlp.workflow("x", "", "w", 0, 10, trace="t2"),
        otlp.chat("y", "x", 1, 4, trace="t2"),
        otlp.chat("z", "x", 5, 9, trace="t2"),
    ]
    reading = both(ours, theirs)
    assert {execution.id: [span.id for span in execution.calls] for execution in reading.executions} == {
        "t1": ["c"], "t2": ["z"],
    }  # fmt: skip
    assert reading.dropped == {COPIED_CALL: 1}


def test_calls_of_one_library_are_never_copies_of_each_other(otlp, both):
    ours = [otlp.workflow("a", "", "w", 0, 10), *(otlp.chat(f"c{index}", "a", 1, 4) for index in range(3))]
    assert total(both(ours, [])) == 3
    reading = both(ours, [otlp.chat("y", "a", 1, 4)])
    assert total(reading) == 3
    assert reading.dropped == {COPIED_CALL: 1}


@pytest.mark.parametrize(
    ("theirs", "calls"),
    [
        ({"start": 1, "end": 4, "gen_ai__response__id": "one"}, 1),
        ({"start": 0.2, "end": 4.5, "gen_ai__response__id": "one"}, 1),
        ({"start": 0.2, "end": 4.5}, 1),
        ({"start": -0.5, "end": 4.5}, 2),
        ({"start": 1, "end": 4, "gen_ai__response__id": "two"}, 2),
        ({"start": 6, "end": 8, "gen_ai__response__id": "one"}, 2),
        ({"start": 1, "end": 4, "model": "other"}, 2),
        ({"start": 1, "end": 4, "tokens": (10, 6)}, 2),
        ({"start": 1, "end": 4, "tokens": None}, 1),
        ({"start": 0.9, "end": 4.1, "tokens": None}, 2),
        ({"start": 0.9, "end": 3.9}, 2),
    ],
)
def test_what_makes_two_spans_one_call(otlp, both, theirs, calls):
    """The same response, or the same model and counts and one interval around the other."""
    start, end = theirs.pop("start"), theirs.pop("end")
    ours = [otlp.workflow("a", "", "w", 0, 10), otlp.chat("c", "a", 1, 4, gen_ai__response__id="one")]
    assert total(both(ours, [otlp.chat("y", "a", start, end, **theirs)])) == calls


def test_two_processes_do_not_share_calls(otlp, both):
    ours = [otlp.workflow("a", "", "w", 0, 10), otlp.chat("c", "a", 1, 4)]
    theirs = [otlp.workflow("x", "", "w", 0, 10, trace="t2"), otlp.chat("y", "x", 1, 4, trace="t2")]
    assert total(both(ours, theirs, other={"process.pid": 8, "host.name": "h"})) == 2
    assert total(both(ours, theirs, other={})) == 1


@given(
    calls=st.lists(
        st.tuples(st.integers(0, 30), st.integers(1, 20), st.booleans(), st.booleans()).filter(lambda c: c[2] or c[3]),
        min_size=1,
        max_size=12,
    ),
    jitter_ms=st.integers(0, 4),
)
def test_every_call_counts_once_whoever_saw_it(otlp, tmp_path_factory, calls, jitter_ms):
    """Calls of one model with the same counts, at any time beside each other."""
    spans = {True: [], False: []}
    for index, (start, length, we, they) in enumerate(calls):
        begin, end = start * 0.04, start * 0.04 + length
        if we:
            spans[True].append(otlp.chat(f"o{index}", "a", begin, end, gen_ai__response__id=f"r{index}"))
        if they:
            more = {"gen_ai__response__id": f"r{index}"}
            spans[False].append(otlp.chat(f"t{index}", "a", begin, end + jitter_ms / 1000, **more))
    requests = (
        otlp.request(otlp.workflow("a", "", "w", 0, 60), *spans[True]),
        otlp.request(*spans[False], scope="opentelemetry.instrumentation.openai"),
    )
    path = otlp.write(tmp_path_factory.mktemp("copies") / "both.jsonl", *requests)
    reading = read_executions([path])
    assert total(reading) == len(calls)
    assert reading.dropped.get(COPIED_CALL, 0) == sum(we and they for _, _, we, they in calls)
