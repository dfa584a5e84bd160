from dataclasses import fields, replace
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.executions import Call, Execution, Span
from scepsy_optimizer.sampling import SampleLimits, bootstrap_weights, hash_of
from scepsy_optimizer.totals import Sum, merge, total
from scepsy_optimizer.totals_workload import workload_of
from scepsy_optimizer.workload import aggregate

# Whole microseconds: shares of a few nanoseconds are mostly the rounding of seconds as binary fractions.
TIMES = st.integers(0, 50_000_000).map(lambda time_us: time_us / 1e6)
CALLS = st.builds(
    lambda llm, role, start, length, tokens, queue_s: (start, start + length, Call(
        llm=llm, role=role, input_tokens=tokens[0], output_tokens=tokens[1], cached_tokens=tokens[0] // 3,
        queue_s=queue_s,
    )),
    st.sampled_from("abc"), st.sampled_from(["plan", "write"]), TIMES, TIMES,
    st.tuples(st.integers(0, 5000), st.integers(0, 900)), st.none() | TIMES,
)  # fmt: skip


@st.composite
def runs(draw):
    """Executions of two workflows, with ids of their own."""
    found = []
    for number, made in enumerate(draw(st.lists(st.lists(CALLS, max_size=5), max_size=14))):
        end_s = max((end for _, end, _ in made), default=1.0) + draw(TIMES)
        spans = [Span(id="root", parent=None, name="w", kind="workflow", start_s=0, end_s=end_s)]
        spans += [
            Span(id=f"c{index}", parent="root", name=call.llm, kind="llm", start_s=start, end_s=end, call=call)
            for index, (start, end, call) in enumerate(made)
        ]
        workflow = draw(st.sampled_from(["one", "two"]))
        found.append(Execution(id=f"run {number}", workflow=workflow, spans=tuple(spans), started_ns=number))
    return found


LIMITS = st.sampled_from(
    [SampleLimits(), SampleLimits(executions=3), SampleLimits(spans=7), SampleLimits(executions=4, spans=9)]
)


@settings(max_examples=60, deadline=None)
@given(runs(), LIMITS, st.data())
def test_parts_in_any_order_add_up_to_exactly_the_whole(found, limits, data):
    whole = total(found, limits=limits)
    shuffled = data.draw(st.permutations(found))
    assert total(shuffled, limits=limits) == whole
    cuts = sorted(data.draw(st.lists(st.integers(0, len(found)), max_size=3)))
    parts = [
        total(shuffled[low:high], limits=limits)
        for low, high in zip([0, *cuts], [*cuts, len(found)], strict=True)
    ]  # fmt: skip
    assert reduce(merge, parts) == whole
    assert reduce(merge, reversed(parts)) == whole


def check_close(found, expected, path=""):
    """Equal but for rounding, wherever the values lie; intervals come from other resamples."""
    for part in fields(expected):
        one, other = getattr(found, part.name), getattr(expected, part.name)
        if part.name == "demands":
            for left, right in zip(one, other, strict=True):
                check_close(left, right, left.llm)
        elif part.name not in ("timelines", "weights", "share_low", "share_high"):
            # A deviation that is 0 comes out of sums of squares as the root of their rounding.
            least = 1e-6 if part.name.endswith("_cv") else 1e-8
            assert one == (other if isinstance(other, str) else pytest.approx(other, rel=1e-6, abs=least)), (
                f"{path} {part.name}"
            )


@settings(max_examples=60, deadline=None)
@given(runs(), st.booleans())
def test_a_workload_of_totals_has_the_means_of_all_executions(found, weigh):
    if not any(run.calls for run in found):
        with pytest.raises(ScepsyError):
            workload_of(total(found, limits=SampleLimits(executions=1)))
        return
    names = {run.workflow for run in found}
    rates = dict(zip(sorted(names), (0.25, 4.0), strict=False)) if weigh else None
    whole = aggregate(found, rates_rps=rates)
    assert workload_of(total(found), rates_rps=rates) == whole
    some = total(found, limits=SampleLimits(executions=1))
    if some.complete:
        return
    workload = workload_of(some, rates_rps=rates)
    # Equal shares may come in another order where they are equal but for rounding.
    order = {demand.llm: place for place, demand in enumerate(workload.demands)}
    check_close(workload, replace(whole, demands=tuple(sorted(whole.demands, key=lambda found: order[found.llm]))))
    assert len(workload.timelines) == len(names)
    assert sum(workload.weights) == pytest.approx(1)


def test_intervals_of_a_stream_are_those_of_the_bootstrap(make_execution):
    rng = np.random.default_rng(3)
    found = [
        make_execution(f"run {number}", [("a", 0, float(rng.gamma(2.0))), ("b", 10, 10 + float(rng.gamma(4.0)))])
        for number in range(400)
    ]
    expected = aggregate(found)
    workload = workload_of(total(found, limits=SampleLimits(executions=50)))
    assert len(workload.timelines) == 50
    for demand in workload.demands:
        other = expected.demand(demand.llm)
        width = other.share_high - other.share_low
        assert demand.share_low == pytest.approx(other.share_low, abs=0.1 * width)
        assert demand.share_high == pytest.approx(other.share_high, abs=0.1 * width)


def test_bootstrap_weights_are_poisson_and_belong_to_the_execution():
    hashes = [hash_of(f"run {number}") for number in range(400)]
    weights = bootstrap_weights(hashes)
    assert weights.mean() == pytest.approx(1, abs=0.01)
    assert weights.var() == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef(weights)[np.triu_indices(len(hashes), 1)]).mean() < 0.03
    assert (bootstrap_weights(hashes[7:8]) == weights[7]).all()


def test_a_sample_is_uniform_over_executions_of_any_size(make_execution):
    """Half of the executions have 10 spans, half 2: half of the sample, too."""
    found = [make_execution(f"run {number}", [("a", 0, 1)] * (1 + 8 * (number % 2))) for number in range(3000)]
    totals = total(found, limits=SampleLimits(executions=2000, spans=6000))
    chosen = totals.sampled
    assert 5500 < sum(len(run.spans) for run in chosen) <= 6000
    assert sum(len(run.spans) == 10 for run in chosen) / len(chosen) == pytest.approx(0.5, abs=0.05)
    assert totals.executions == 3000
    assert totals.workflows["w"].sum(Sum.CALLS, "a") == totals.calls == 1500 * 10


def test_samples_of_different_limits_do_not_mix(make_execution):
    one = total([make_execution("x", [("a", 0, 1)])])
    with pytest.raises(ValueError, match="cannot be merged"):
        merge(one, total([], limits=SampleLimits(executions=5)))
    assert merge(one, total([])) == one
