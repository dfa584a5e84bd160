import numpy as np
import pytest

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.executions import Call, Execution, Span
from scepsy_optimizer.shape import Bursts, bursts_of
from scepsy_optimizer.workload import aggregate


def test_a_sequence(make_execution):
    workload = aggregate([make_execution("e", [("a", 0, 3), ("b", 3, 4), ("a", 5, 8)])])
    a, b = workload.demands
    assert (a.llm, b.llm) == ("a", "b")
    assert (a.visits, b.visits) == (2, 1)
    assert a.share == pytest.approx(6 / 7)
    assert a.share_low == pytest.approx(a.share) == pytest.approx(a.share_high)
    assert (a.critical_visits, b.critical_visits) == (2, 1)
    assert a.parallelism == pytest.approx(1)
    assert a.overlap == pytest.approx(1)
    assert a.visits_by_role == {"r": 2}
    assert workload.latency_s == pytest.approx(9)
    assert workload.tool_s == pytest.approx(2)
    assert a.longest_tokens == 600


def test_fan_out_has_parallelism(make_execution):
    workload = aggregate([make_execution("e", [("a", 0, 4), ("a", 0, 4), ("a", 0, 2)])])
    (a,) = workload.demands
    assert a.parallelism == pytest.approx(10 / 4)
    # three run for two seconds, two for the next two: a running call sees (9 * 2 + 4 * 2) / 10
    assert a.overlap == pytest.approx(2.6)
    assert a.critical_visits == 1
    assert a.visits == 3


def test_the_share_is_sum_by_sum_and_its_interval_covers_it(make_execution):
    runs = [make_execution(str(n), [("a", 0, 1 + n % 3), ("b", 10, 12)]) for n in range(60)]
    workload = aggregate(runs, rng=np.random.default_rng(1))
    a = workload.demand("a")
    assert a.share == pytest.approx(2 / 4)
    assert a.share_low < a.share < a.share_high
    assert a.share_high - a.share_low < 0.15
    assert a.share_cv > 0
    assert sum(demand.share for demand in workload.demands) == pytest.approx(1)
    assert workload == aggregate(runs, rng=np.random.default_rng(1))


def test_queueing_is_not_service():
    spans = (
        Span(id="r", parent=None, name="w", kind="workflow", start_s=0, end_s=10),
        Span(id="c", parent="r", name="a", kind="llm", start_s=0, end_s=10, call=Call(llm="a", queue_s=7)),
    )
    workload = aggregate([Execution(id="e", workflow="w", spans=spans)])
    assert workload.demands[0].service_s == pytest.approx(3)


def test_nothing_to_aggregate_is_an_error(make_execution):
    with pytest.raises(ScepsyError, match="no executions"):
        aggregate([])
    root = Span(id="r", parent=None, name="w", kind="workflow", start_s=0, end_s=1)
    with pytest.raises(ScepsyError, match="none of the 1 executions calls an LLM"):
        aggregate([Execution(id="e", workflow="w", spans=(root,))])
    with pytest.raises(ScepsyError, match="no call of 'x'; the traces call a"):
        aggregate([make_execution("e", [("a", 0, 1)])]).demand("x")


def test_rates_weigh_workflows_however_often_they_were_traced(make_execution):
    often = [make_execution(f"o{n}", [("a", 0, 2)], workflow="often") for n in range(9)]
    seldom = [make_execution("s", [("b", 0, 4), ("b", 4, 8)], workflow="seldom")]
    even = aggregate([*often, *seldom], rates_rps={"often": 2.0, "seldom": 2.0})
    assert even.demand("a").visits == pytest.approx(0.5)
    assert even.demand("b").visits == pytest.approx(1.0)
    assert even.demand("b").share == pytest.approx(8 / 10)
    assert even.latency_s == pytest.approx((3 + 9) / 2)
    assert sum(even.weights) == pytest.approx(1)
    traced = aggregate([*often, *seldom])
    same = aggregate([*often, *seldom], rates_rps={"often": 9.0, "seldom": 1.0})
    assert same.latency_s == pytest.approx(traced.latency_s)
    assert same.demand("b").share == pytest.approx(traced.demand("b").share)
    with pytest.raises(ScepsyError, match="give each traced workflow a rate"):
        aggregate([*often, *seldom], rates_rps={"often": 1.0})
    with pytest.raises(ScepsyError, match="must be a positive number"):
        aggregate([*often, *seldom], rates_rps={"often": 1.0, "seldom": 0.0})


def test_bursts_are_calls_that_start_together():
    spans = [
        Span(id="a", parent="r", name="m", kind="llm", start_s=0, end_s=10, call=Call(llm="m", input_tokens=300)),
        Span(
            id="b",
            parent="r",
            name="m",
            kind="llm",
            start_s=1,
            end_s=4,
            call=Call(llm="m", input_tokens=200, cached_tokens=100),
        ),
        # After a tenth of the first one's time: another burst, of one call.
        Span(id="c", parent="r", name="m", kind="llm", start_s=1.1, end_s=3, call=Call(llm="m", input_tokens=500)),
    ]
    assert bursts_of(spans) == Bursts(number=2, squares=5, beside_tokens=200)
    assert bursts_of([]) == Bursts(number=0, squares=0, beside_tokens=0)
