import json
from dataclasses import replace

import pytest

from scepsy.report.summary import executions_needed, warnings
from scepsy.traces import Reading
from scepsy_optimizer.executions import Execution
from scepsy_optimizer.sampling import SampleLimits
from scepsy_optimizer.shape import shape_of
from scepsy_optimizer.workload import aggregate


def test_the_critical_path_adds_up_to_the_latency(reading, summarised):
    summary = summarised(reading)
    parts = summary["critical_path_s"]
    assert sum(parts["llms"].values()) + parts["outside_llms"] == pytest.approx(summary["latency_s"], rel=1e-12)
    # b is longer than a, so that only it and c are waited for: 4 and 3 of 10, the rest is outside.
    assert parts["llms"]["small"] == pytest.approx(0.4 * summary["latency_s"])
    assert parts["llms"]["big"] == pytest.approx(0.3 * summary["latency_s"])


def test_roles_add_up_to_shares_and_visits(reading, summarised):
    summary = summarised(reading)
    for llm in summary["llms"]:
        mine = [role for role in summary["roles"] if role["llm"] == llm["llm"]]
        assert sum(role["share"] for role in mine) == pytest.approx(llm["share"])
        assert sum(role["visits"] for role in mine) == pytest.approx(llm["visits"])
    assert {(role["llm"], role["role"]): role["visits"] for role in summary["roles"]} == {
        ("big", "plan"): 1, ("big", "write [it]"): 1, ("small", "plan"): 1,
    }  # fmt: skip


def test_transitions_are_waits(reading, summarised):
    """The last call waits for both before it; a tool in between carries the wait."""
    edges = {
        (tuple(edge["from"]) if edge["from"] else None, tuple(edge["to"])): edge["per_execution"]
        for edge in summarised(reading)["transitions"]
    }
    write = ("big", "write [it]")
    assert edges[None, ("big", "plan")] == edges[None, ("small", "plan")] == 1
    assert edges[("small", "plan"), write] == 1
    assert sum(edges.values()) == pytest.approx(len(edges))


def test_workflows_are_told_apart(reading, summarised):
    summary = summarised(reading)
    assert [flow["executions"] for flow in summary["workflows"]] == [15, 15]
    for flow in summary["workflows"]:
        assert (flow["width"]["max"], flow["depth"]["max"], flow["recursion"], flow["calls"]) == (2, 2, 1, 3)
        assert sum(flow["latency_s"]["counts"]) == 15


def test_it_is_json_and_timelines_come_from_short_to_long(reading, summarised):
    summary = json.loads(json.dumps(summarised(reading), allow_nan=False))
    lengths = [run["makespan_s"] for run in summary["timelines"]]
    assert lengths == sorted(lengths)
    assert len(lengths) == 30
    spans = summary["timelines"][0]["spans"]
    assert [row[0] for row in spans] == [-1, 0, 1, 1, 0, 0]
    assert [row[-1] for row in spans if len(row) > 5] == [False, True, True]
    assert "timelines" not in summarised(reading, timelines=False)


def test_many_executions_are_thinned_for_drawing_only(make_execution, summarised):
    runs = tuple(make_execution(number, stretch=1 + number / 100) for number in range(500))
    summary = summarised(Reading(executions=runs))
    assert len(summary["timelines"]) == 200
    assert summary["timelines"][0]["makespan_s"] == 10
    assert summary["timelines"][-1]["makespan_s"] == pytest.approx(59.9)
    assert sum(sum(flow["latency_s"]["counts"]) for flow in summary["workflows"]) == 500


def test_more_executions_narrow_the_interval(reading):
    """The half width falls as one over the root: twice the aim needs four times as many."""
    demand = replace(aggregate(reading.executions).demands[0], share=0.5, share_low=0.4, share_high=0.6)
    assert executions_needed(demand, 100) == 300
    assert executions_needed(replace(demand, share_low=0.46, share_high=0.54), 100) == 0
    assert executions_needed(demand, 1) is None
    assert executions_needed(replace(demand, share=0.0), 100) is None


def test_warnings_speak_of_queueing_and_of_too_few(make_execution, summarised):
    unknown = warnings(summarised(Reading(executions=(make_execution(1),))))
    assert "not recorded" in unknown[0]
    assert "One execution" in unknown[1]
    runs = tuple(make_execution(number, queue_s=1.0) for number in range(4))
    (queued,) = warnings(summarised(Reading(executions=runs)))
    assert queued.startswith("30% of the calls' time was queueing")


def test_shape_of_a_recursion(make_span):
    spans = [make_span("root", None, 0, 10, kind="workflow")]
    for level in range(4):
        spans.append(make_span(f"level {level}", spans[-1].id, level, 10 - level, name="research"))
    spans += [
        make_span("x", "level 3", 4, 5, llm="m"),
        make_span("y", "level 3", 5, 6, llm="m"),
        make_span("z", "level 3", 4.5, 6, llm="m"),
    ]
    shape = shape_of(Execution(id="e", workflow="w", spans=tuple(spans)))
    assert (shape.width, shape.depth, shape.recursion, shape.rounds) == (2, 2, 4, 1)


def test_shape_of_a_loop(make_span):
    spans = [make_span("root", None, 0, 10, kind="workflow")]
    spans += [make_span(f"round {number}", "root", number, number + 1, name="try") for number in range(7)]
    shape = shape_of(Execution(id="e", workflow="w", spans=tuple(spans)))
    assert (shape.width, shape.depth, shape.recursion, shape.rounds) == (0, 0, 1, 7)


def rounded(value):
    return json.loads(json.dumps(value), parse_float=lambda text: round(float(text), 9))


def test_more_executions_than_a_sample_holds(make_execution, summarised):
    """Everything but distributions and timelines is of all of them."""
    runs = tuple(make_execution(number, stretch=1 + number % 5) for number in range(300))
    whole = summarised(Reading(executions=runs))
    some = summarised(Reading(executions=runs), limits=SampleLimits(executions=40))
    assert (some["executions"], some["sampled"], len(some["timelines"])) == (300, 80, 80)
    assert warnings(some)[-1].startswith("Quantiles, histograms and timelines are of a random sample of 80")
    assert not any("sample" in sentence for sentence in warnings(whole))
    for key in ("calls", "transitions", "roles", "critical_path_s", "queueing", "latency_s", "tool_s"):
        assert rounded(some[key]) == rounded(whole[key]), key
    for one, other in zip(some["workflows"], whole["workflows"], strict=True):
        assert {**one, "latency_s": None} == {**other, "latency_s": None}
        assert one["latency_s"]["mean"] == other["latency_s"]["mean"]
        assert one["latency_s"]["quantiles"]["0.5"] == pytest.approx(other["latency_s"]["quantiles"]["0.5"], rel=0.35)
    for one, other in zip(some["llms"], whole["llms"], strict=True):
        assert one["share"] == pytest.approx(other["share"])
        assert one["more_executions"] == pytest.approx(other["more_executions"], rel=0.3, abs=1)
