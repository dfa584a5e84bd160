"""Retiming: traced durations give traced makespans, new durations move only what waits for them."""

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scepsy_optimizer.executions import Call, Execution, Span
from scepsy_optimizer.timeline import call_graph, compile_timeline, retime, waits


def step(id, parent, start, end, kind="agent"):
    return Span(id=id, parent=parent, name=id, kind=kind, start_s=start, end_s=end)


def call(id, parent, start, end, llm="m"):
    return Span(
        id=id, parent=parent, name=id, kind="llm", start_s=start, end_s=end, call=Call(llm=llm, output_tokens=10)
    )


def execution(*spans):
    return Execution(id="e", workflow="w", spans=spans)


SEQUENCE = execution(step("root", None, 0, 10), call("a", "root", 1, 4), call("b", "root", 5, 9))
FAN_OUT = execution(
    step("root", None, 0, 10), call("a", "root", 1, 4), call("b", "root", 1.5, 8), call("c", "root", 8.5, 9.5)
)


def test_sequence_keeps_its_gaps():
    timeline = compile_timeline(SEQUENCE)
    assert timeline.makespan_s(timeline.traced_s) == pytest.approx(10)
    # gaps: 1 before a, 1 between, 1 after b
    assert timeline.makespan_s([0, 0]) == pytest.approx(3)
    assert timeline.makespan_s([5, 1]) == pytest.approx(9)


def test_fan_out_waits_for_the_slowest():
    timeline = compile_timeline(FAN_OUT)
    assert timeline.span_ids == ("a", "b", "c")
    path = timeline.critical_path(timeline.traced_s)
    assert path.calls == (1, 2)
    assert path.fixed_s == pytest.approx(1.5 + 0.5 + 0.5)
    # a becomes the slow one: it starts at 1 and takes 10
    assert timeline.makespan_s([10, 6.5, 1]) == pytest.approx(1 + 10 + 0.5 + 1 + 0.5)
    assert timeline.critical_path([10, 6.5, 1]).calls == (0, 2)


def test_nested_steps_pass_waits_through():
    run = execution(
        step("root", None, 0, 12),
        step("left", "root", 0, 5),
        call("l1", "left", 1, 4),
        step("right", "root", 0, 7),
        call("r1", "right", 1, 3),
        call("r2", "right", 3, 6),
        call("join", "root", 8, 11),
    )
    graph = call_graph(run)
    assert set(graph.edges) == {("r1", "r2"), ("l1", "join"), ("r2", "join")}
    assert graph.nodes["join"]["call"].llm == "m"
    timeline = compile_timeline(run)
    durations = dict(zip(timeline.span_ids, timeline.traced_s, strict=True))
    moved = [durations[name] + (10 if name == "l1" else 0) for name in timeline.span_ids]
    # left now ends at 15: one second of gap, join, one second of tail
    assert timeline.makespan_s(moved) == pytest.approx(15 + 1 + 3 + 1)


def test_background_work_that_outlives_the_root_does_not_count():
    run = execution(step("root", None, 0, 2), call("a", "root", 0.5, 1), call("late", "root", 0.5, 9))
    timeline = compile_timeline(run)
    assert timeline.makespan_s(timeline.traced_s) == pytest.approx(2)
    assert timeline.critical_path(timeline.traced_s).calls == (0,)


def test_deep_recursion_compiles():
    depth = 3000
    spans = [step("s0", None, 0, 10)]
    spans += [step(f"s{level}", f"s{level - 1}", 0, 10) for level in range(1, depth)]
    spans.append(call("leaf", f"s{depth - 1}", 1, 9))
    timeline = compile_timeline(execution(*spans))
    assert timeline.makespan_s([3]) == pytest.approx(5)


def test_retime_by_span_id():
    assert retime([SEQUENCE], {("e", "a"): 13.0}) == {"e": pytest.approx(20)}


@st.composite
def trees(draw):
    """A random tree of spans on a coarse time grid, so that ties and zero durations are common."""
    spans = [step("0", None, 0, 20)]
    parents = [spans[0]]
    for index in range(1, draw(st.integers(1, 15))):
        parent = draw(st.sampled_from(parents))
        start = draw(st.integers(int(parent.start_s) - 1, int(parent.end_s)))
        end = draw(st.integers(start, int(parent.end_s) + 2)) if start <= parent.end_s + 2 else start
        if draw(st.booleans()):
            spans.append(call(str(index), parent.id, start, end, llm=draw(st.sampled_from("mn"))))
        else:
            spans.append(step(str(index), parent.id, start, end))
            parents.append(spans[-1])
    return execution(*spans)


@given(trees())
def test_traced_durations_give_the_traced_makespan(run):
    timeline = compile_timeline(run)
    path = timeline.critical_path(timeline.traced_s)
    assert timeline.makespan_s(timeline.traced_s) == pytest.approx(run.makespan_s, abs=1e-9)
    attributed = path.fixed_s + sum(timeline.traced_s[index] for index in path.calls)
    assert attributed == pytest.approx(path.makespan_s, abs=1e-9)
    assert sorted(timeline.span_ids) == sorted(span.id for span in run.calls)


@given(trees(), st.data())
def test_a_linearisation_bounds_the_makespan_from_below(run, data):
    timeline = compile_timeline(run)
    durations = st.lists(st.floats(0, 30), min_size=len(timeline.calls), max_size=len(timeline.calls))
    here, there = data.draw(durations), data.draw(durations)
    path = timeline.critical_path(here)
    linear = path.fixed_s + sum(there[index] for index in path.calls)
    assert linear <= timeline.makespan_s(there) + 1e-9


@given(trees())
def test_the_call_graph_is_acyclic_and_reduced(run):
    graph = call_graph(run)
    assert nx.is_directed_acyclic_graph(graph)
    assert set(nx.transitive_reduction(graph).edges) == set(graph.edges)
    assert len(graph) == len(run.calls)


@given(trees())
def test_waits_are_the_transitive_reduction_of_all_waits(run):
    """Against networkx: without the waits that follow from others, and with the ends of calls as the only carriers."""
    timeline = compile_timeline(run)
    full = nx.DiGraph()
    full.add_nodes_from(range(len(timeline.calls)))
    latest = []
    for before, index in zip(timeline.predecessors, timeline.call_of, strict=True):
        sources = set().union(*(latest[event] for event in before))
        if index >= 0:
            full.add_edges_from((source, index) for source in sources)
            sources = {index}
        latest.append(sources)
    found = waits(timeline)
    assert {pair for pair in found if pair[0] >= 0} == set(nx.transitive_reduction(full).edges)
    assert {target for source, target in found if source < 0} == {node for node in full if full.in_degree(node) == 0}
    assert len(found) == len(set(found))


@st.composite
def crowds(draw):
    """Many children of one span, some of which start or end after it."""
    times = draw(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 5)), max_size=40))
    children = [call(f"{index:02}", "root", start, start + lasts) for index, (start, lasts) in enumerate(times)]
    return execution(step("root", None, 0, draw(st.integers(0, 15))), *children)


def plainly_compiled(run):
    """Predecessors and delays by the definition: every start and every end looks at all children that are done."""
    events = []

    def add(waits, time):
        events.append((waits[0], time - waits[1]))
        return len(events) - 1

    def waited_for(done, time, otherwise):
        ended = [(child, event) for child, event in done if child.end_s <= time]
        if not ended:
            return otherwise
        horizon = max(child.start_s for child, _ in ended)
        last = tuple(event for child, event in ended if child.end_s > horizon or child.start_s == horizon)
        return last, max(child.end_s for child, _ in ended)

    def end_of(span, start):
        if span.call is not None:
            return add(((start,), 0.0), 0.0)
        done = []
        otherwise = (start,), span.start_s
        children = [child for child in run.spans if child.parent == span.id]
        for child in sorted(children, key=lambda child: (child.start_s, child.end_s, child.id)):
            began = add(waited_for(done, child.start_s, otherwise), child.start_s)
            done.append((child, end_of(child, began)))
        return add(waited_for(done, span.end_s, otherwise), span.end_s)

    end_of(run.spans[0], add(((), 0.0), 0.0))
    return events


@given(st.one_of(trees(), crowds()))
def test_compiled_waits_are_those_of_the_definition(run):
    timeline = compile_timeline(run)
    assert list(zip(timeline.predecessors, timeline.delay_s, strict=True)) == plainly_compiled(run)


class Instant(float):
    """A time that counts how often it is compared."""

    compared = 0

    def __le__(self, other):
        Instant.compared += 1
        return float(self) <= other

    def __lt__(self, other):
        Instant.compared += 1
        return float(self) < other

    def __gt__(self, other):
        Instant.compared += 1
        return float(self) > other


@pytest.mark.parametrize(
    "times",
    [
        pytest.param([(2 * index, 2 * index + 1) for index in range(2000)], id="one after another"),
        pytest.param([(index, index + 5) for index in range(2000)], id="overlapping"),
        pytest.param([(index % 7, 4000 + index) for index in range(2000)], id="all at once"),
        pytest.param([(0, 1)] * 1000 + [(2, 3)] * 1000, id="all at once, twice"),
    ],
)
def test_the_work_grows_with_the_calls_and_not_with_their_square(times):
    calls = [call(f"{index:04}", "root", Instant(start), Instant(end)) for index, (start, end) in enumerate(times)]
    Instant.compared = 0
    compile_timeline(execution(step("root", None, Instant(0), Instant(7000)), *calls))
    assert Instant.compared < 60 * len(times)
