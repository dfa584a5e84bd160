import sys

import pytest

from scepsy.traces import read_executions
from scepsy.traces.assemble import (
    BACKWARDS,
    CIRCLE,
    FAILED_CALL,
    FAILED_ROOT,
    FILLED_IN,
    LOST_CALL,
    NAMELESS_CALL,
    NO_ROOT,
    SKEWED,
    UNCOUNTED,
    UNENDED,
    UNENDED_ROOT,
    assemble,
    fill_in,
)
from scepsy.traces.reading import NoExecutionError, iter_executions
from scepsy.traces.records import LLM, STEP, TRANSPORT, SpanRecord, Tally
from scepsy.traces.tree import DUPLICATE, ORPHAN


def calls(execution):
    return [
        (span.call.llm, span.call.role, span.start_s, span.end_s, span.call.input_tokens, span.call.output_tokens)
        for span in execution.calls
    ]


def well_formed(execution):
    seen = {}
    for index, span in enumerate(execution.spans):
        assert (span.parent is None) == (index == 0)
        assert span.id not in seen
        assert index == 0 or seen[span.parent].call is None
        assert (span.kind == "llm") == (span.call is not None)
        seen[span.id] = span
    return True


def test_a_workflow_with_an_agent(otlp, read):
    reading = read(
        otlp.chat("c", "b", 1.5, 2.25, model="big", tokens=(100, 20)),
        otlp.agent("b", "a", "solver", 1.25, 2.5),
        otlp.workflow("a", "", "solve", 1.0, 3.0),
    )
    (execution,) = reading.executions
    assert well_formed(execution)
    assert (execution.id, execution.workflow, execution.makespan_s) == ("t1", "solve", 2.0)
    assert [(span.id, span.parent, span.kind) for span in execution.spans] == [
        ("a", None, "workflow"),
        ("b", "a", "agent"),
        ("c", "b", "llm"),
    ]
    assert calls(execution) == [("big", "solver", 0.5, 1.25, 100, 20)]
    assert (reading.dropped, reading.repaired, reading.files, reading.spans) == ({}, {}, 1, 3)


def test_own_attributes_win(otlp, read):
    (execution,) = read(
        otlp.span("a", "", "f", 0, 1, scepsy__kind="workflow", gen_ai__workflow__name="flow"),
        otlp.span(
            "b", "a", "call", 0, 1, scepsy__kind="llm", gen_ai__request__model="m", scepsy__role="judge",
            gen_ai__usage__input_tokens=7, gen_ai__usage__output_tokens=3,
            gen_ai__usage__cache_read__input_tokens=4, gen_ai__response__time_to_first_chunk=0.25, scepsy__queue_s=0.1,
        ),
    ).executions  # fmt: skip
    (span,) = execution.calls
    call = span.call
    assert (call.role, call.cached_tokens, call.time_to_first_token_s, call.queue_s) == ("judge", 4, 0.25, 0.1)


def test_the_innermost_llm_span_counts_and_borrows(otlp, read):
    """A framework's wrapper knows model and tokens, the client's span inside has the right times."""
    (execution,) = read(
        otlp.workflow("a", "", "w", 0, 10),
        otlp.chat("outer", "a", 1, 9, model="m", tokens=(50, 9)),
        otlp.chat("middle", "outer", 2, 8, model="", tokens=None),
        otlp.chat("inner", "middle", 3, 7, model="", tokens=None),
    ).executions
    assert well_formed(execution)
    assert calls(execution) == [("m", "w", 3, 7, 50, 9)]
    assert [span.id for span in execution.spans] == ["a", "inner"]


def test_a_transport_span_lends_and_goes(otlp, read):
    (execution,) = read(
        otlp.workflow("a", "", "w", 0, 10),
        otlp.chat("c", "a", 1, 9, model="m", tokens=None),
        otlp.chat(
            "http", "c", 2, 8, tokens=(5, 6), scepsy__transport=True, gen_ai__response__time_to_first_chunk=1.5
        ),
        otlp.span("socket", "http", "POST", 3, 7),
    ).executions  # fmt: skip
    assert [span.id for span in execution.spans] == ["a", "c"]
    assert calls(execution) == [("m", "w", 1, 9, 5, 6)]
    assert execution.calls[0].call.time_to_first_token_s == 1.5


def test_a_transport_span_alone_is_the_call(otlp, read):
    (execution,) = read(
        otlp.workflow("a", "", "w", 0, 10), otlp.chat("http", "a", 2, 8, tokens=(5, 6), scepsy__transport=True)
    ).executions
    assert calls(execution) == [("m", "w", 2, 8, 5, 6)]


def test_a_wrapper_around_several_calls_is_a_step(otlp, read):
    """As a retry inside a framework's span: its counts are not those of either call."""
    reading = read(
        otlp.workflow("a", "", "w", 0, 10),
        otlp.chat("outer", "a", 1, 9, model="m", tokens=(50, 9)),
        otlp.chat("first", "outer", 2, 4, model="", tokens=None, status=2),
        otlp.chat("second", "outer", 5, 8, model="", tokens=(50, 9)),
    )
    (execution,) = reading.executions
    assert well_formed(execution)
    assert calls(execution) == [("m", "w", 5, 8, 50, 9)]
    assert [(span.id, span.kind) for span in execution.spans] == [
        ("a", "workflow"),
        ("outer", "step"),
        ("first", "step"),
        ("second", "llm"),
    ]
    assert reading.dropped == {FAILED_CALL: 1}


def test_a_call_around_a_tool_with_a_call_of_its_own_stays_a_step(otlp, read):
    (execution,) = read(
        otlp.workflow("a", "", "w", 0, 10),
        otlp.chat("outer", "a", 1, 9, model="m"),
        otlp.span("tool", "outer", "search", 2, 8, gen_ai__operation__name="execute_tool"),
        otlp.chat("inner", "tool", 3, 7, model="n"),
    ).executions
    assert well_formed(execution)
    assert calls(execution) == [("n", "search", 3, 7, 10, 5)]
    assert [(span.id, span.parent) for span in execution.spans][1:] == [
        ("outer", "a"),
        ("tool", "outer"),
        ("inner", "tool"),
    ]


@pytest.mark.parametrize("failure", [{"status": 2}, {"error__type": "CancelledError"}])
def test_failed_calls_are_steps(otlp, read, failure):
    reading = read(otlp.workflow("a", "", "w", 0, 10), otlp.chat("c", "a", 1, 9, **failure), otlp.chat("d", "a", 9, 10))
    (execution,) = reading.executions
    assert [(span.id, span.kind, span.duration_s) for span in execution.spans] == [
        ("a", "workflow", 10),
        ("c", "step", 8),
        ("d", "llm", 1),
    ]
    assert reading.dropped == {FAILED_CALL: 1}


def test_calls_without_a_model_are_steps(otlp, read):
    reading = read(otlp.workflow("a", "", "w", 0, 10), otlp.chat("c", "a", 1, 9, model=""))
    assert reading.dropped == {NAMELESS_CALL: 1}
    assert reading.executions[0].calls == ()


def test_several_roots_get_one_above_them(otlp, read):
    (execution,) = read(
        otlp.chat("c", "", 1, 2), otlp.workflow("a", "", "outermost", 3, 6), otlp.workflow("b", "a", "inner", 4, 5)
    ).executions
    assert well_formed(execution)
    assert (execution.workflow, execution.makespan_s) == ("outermost", 5)
    assert [(span.id, span.parent, span.start_s) for span in execution.spans] == [
        ("root", None, 0),
        ("c", "root", 0),
        ("a", "root", 2),
        ("b", "a", 3),
    ]


def test_a_lone_call_is_an_execution(otlp, read):
    (execution,) = read(otlp.chat("c", "", 1, 2)).executions
    assert well_formed(execution)
    assert (execution.makespan_s, execution.workflow) == (1, "chat m")
    assert len(execution.calls) == 1


def test_a_workflow_under_another_root_names_it(otlp, read):
    (execution,) = read(otlp.span("web", "", "POST /ask", 0, 2), otlp.workflow("a", "web", "answer", 0.5, 1)).executions
    assert (execution.workflow, execution.spans[0].name) == ("answer", "POST /ask")


def test_children_may_outlive_their_parent(otlp, read):
    (execution,) = read(otlp.workflow("a", "", "w", 1, 2), otlp.chat("c", "a", 0.5, 3)).executions
    assert calls(execution) == [("m", "w", -0.5, 2.0, 10, 5)]


def test_executions_that_never_ended_are_left_out(otlp, read):
    reading = read(
        otlp.workflow("a", "", "w", 0, 1, trace="whole"),
        otlp.workflow("a", "", "w", 0, None, trace="unended"),
        otlp.chat("c", "a", 0, 1, trace="rootless"),
        otlp.workflow("inner", "a", "w", 0, 1, trace="recursive and cut"),
        otlp.workflow("a", "", "w", 0, 1, trace="failed", status=2),
    )
    assert [execution.id for execution in reading.executions] == ["whole"]
    assert reading.dropped == {NO_ROOT: 2, UNENDED_ROOT: 1, FAILED_ROOT: 1, LOST_CALL: 1}


def test_a_root_may_have_a_parent_in_another_process(otlp, read):
    (execution,) = read(otlp.workflow("a", "gateway", "w", 0, 1, flags=0x300), otlp.chat("c", "a", 0, 1)).executions
    assert execution.spans[0].id == "a"


def test_a_remote_span_on_another_clock_is_moved_into_its_parent(otlp, read):
    reading = read(
        otlp.workflow("a", "", "w", 0, 10),
        otlp.agent("b", "a", "remote", 1000, 1008, flags=0x300),
        otlp.chat("c", "b", 1002, 1004),
    )
    assert reading.repaired == {SKEWED: 1}
    assert calls(reading.executions[0]) == [("m", "remote", 3, 5, 10, 5)]


def test_orphans_go_under_the_root(otlp, read):
    reading = read(otlp.workflow("a", "", "w", 0, 10), otlp.chat("c", "lost", 2, 4))
    assert reading.repaired == {ORPHAN: 1}
    assert reading.executions[0].spans[1].parent == "a"


def test_broken_spans_are_counted(otlp, read):
    reading = read(
        otlp.workflow("a", "", "w", 0, 10),
        otlp.workflow("a", "", "w", 0, 10),
        otlp.span("x", "y", "one", 1, 2),
        otlp.span("y", "x", "two", 1, 2),
        otlp.span("self", "self", "three", 1, 2),
        otlp.span("back", "a", "four", 5, 4),
        otlp.span("open", "a", "five", 6, None),
    )
    assert reading.dropped == {DUPLICATE: 1, CIRCLE: 2}
    assert reading.repaired == {BACKWARDS: 1, UNENDED: 1, ORPHAN: 1}
    by_id = {span.id: span for span in reading.executions[0].spans}
    assert (by_id["back"].start_s, by_id["back"].end_s) == (5, 5)
    assert by_id["open"].end_s == 10


def test_one_model_at_several_endpoints_is_several_llms(otlp, read):
    at = {"server__address": "host", "server__port": 1}
    other = {"server__address": "host", "server__port": 2}
    (execution,) = read(
        otlp.workflow("a", "", "w", 0, 10),
        otlp.chat("b", "a", 1, 2, model="same", **at),
        otlp.chat("c", "a", 1, 2, model="same", **other),
        otlp.chat("d", "a", 1, 2, model="once", **at),
    ).executions
    assert sorted(span.call.llm for span in execution.calls) == ["once", "same@host:1", "same@host:2"]


def test_where_a_model_was_looked_for_in_vain_is_no_endpoint_of_it(otlp, read):
    at = {"server__address": "host", "server__port": 1}
    other = {"server__address": "host", "server__port": 2}
    (execution,) = read(
        otlp.workflow("a", "", "w", 0, 10),
        otlp.chat("b", "a", 1, 2, model="only", status=2, **other),
        otlp.chat("c", "a", 2, 3, model="only", **at),
    ).executions
    assert {span.call.llm for span in execution.calls} == {"only"}


def test_deep_recursion_is_no_problem(otlp, read):
    depth = 5000
    (execution,) = read(
        otlp.workflow("0", "", "deep", 0, 10),
        *(otlp.workflow(str(level), str(level - 1), "deep", 0, 10) for level in range(1, depth)),
        otlp.chat("c", str(depth - 1), 1, 2),
    ).executions
    assert well_formed(execution)
    assert len(execution.spans) == depth + 1


def test_no_whole_execution_says_what_was_found(otlp, tmp_path):
    path = otlp.write(tmp_path / "cut.jsonl", otlp.request(otlp.chat("c", "a", 0, 1)))
    with pytest.raises(
        NoExecutionError, match="no whole execution.*1 spans; left out: 1 executions without their root"
    ):
        read_executions([path])


def test_nothing_of_a_trace_stays_in_memory():
    """Its tree is full of circles of references, of which the garbage collector is not told."""
    nested = [("a", "", STEP), ("b", "a", LLM), ("c", "b", LLM), ("d", "c", TRANSPORT)]
    circle = [("x", "y", STEP), ("y", "x", STEP)]
    records = [
        SpanRecord("t", own, up, "n", kind, 1, 2, "", False, "", "", model="m") for own, up, kind in nested + circle
    ]
    before = [sys.getrefcount(record) for record in records]
    tally = Tally()
    assert assemble("t", records, name_llm=lambda model, _: model, tally=tally) is not None
    assert [sys.getrefcount(record) for record in records] == before


@pytest.mark.parametrize("aside_bytes", [1, 1 << 20])
def test_calls_without_counts_get_the_mean_of_the_others(otlp, tmp_path, monkeypatch, aside_bytes):
    """Of their LLM in their role, else of their LLM; count by count, since embeddings tell no output."""
    monkeypatch.setattr("scepsy.traces.assemble._ASIDE_BYTES", aside_bytes)
    cached = {"gen_ai__usage__cache_read__input_tokens": 40}
    only_input = {"gen_ai__usage__input_tokens": 7}

    def trace(name, *calls):
        made = [otlp.workflow("a", "", "w", 0, 9, trace=name)]
        for number, (role, model, more) in enumerate(calls):
            own = f"{name}{number}"
            made.append(otlp.agent(f"r{own}", "a", role, number, number + 1, trace=name))
            made.append(otlp.chat(own, f"r{own}", number, number + 1, trace=name, model=model, **more))
        return made

    path = otlp.write(
        tmp_path / "spans.jsonl",
        otlp.request(
            *trace("t1", ("x", "m", {"tokens": None}), ("z", "m", {"tokens": None}), ("x", "e", {"tokens": None})),
            *trace("t2", ("x", "m", {"tokens": (100, 10), **cached}), ("x", "m", {"tokens": (200, 21)})),
            *trace("t3", ("y", "m", {"tokens": (900, 50)}), ("x", "e", {"tokens": None, **only_input})),
            *trace("t4", ("y", "m", {"tokens": (-5, -1)}), ("y", "m", {"tokens": (0, 0)})),
            *trace("t5", ("x", "m", {"tokens": None, **only_input}), ("x", "n", {"tokens": None})),
        ),
    )
    tally = Tally()
    found = {execution.id: execution for execution in fill_in(iter_executions([path], tally), tally)}
    told = {
        name: [(one.input_tokens, one.cached_tokens, one.output_tokens) for one in (span.call for span in each.calls)]
        for name, each in found.items()
    }
    assert told == {
        "t1": [(102, 13, 16), (302, 10, 27), (7, 0, 0)],
        "t2": [(100, 40, 10), (200, 0, 21)],
        "t3": [(900, 0, 50), (7, 0, 0)],
        "t4": [(900, 0, 50), (900, 0, 50)],
        "t5": [(7, 0, 16), (0, 0, 0)],
    }
    assert all(well_formed(execution) for execution in found.values())
    assert tally.repaired == {FILLED_IN: 6, UNCOUNTED: 1}
