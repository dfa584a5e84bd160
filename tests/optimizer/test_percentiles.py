"""Predicted latencies of a plan against what they are made of, and against a replay."""

from fractions import Fraction

import numpy as np
import pytest

from scepsy_optimizer.allocation import Choice
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.percentiles import predict_latencies
from scepsy_optimizer.planner import predict
from scepsy_optimizer.replay import replay
from scepsy_optimizer.workload import aggregate

CLUSTER = parse_cluster("2xH100")
LENGTHS = {"short": 9, "long": 900}
ONE = (Choice(tensor_parallel_size=1, fraction=Fraction(1), replicas=1),)


@pytest.fixture(scope="module")
def planned(make_profile, make_execution):
    """A plan at hardly any load for 40 executions, each of one call, of 10, 20, ... 400 output tokens."""
    runs = [make_execution(f"e{number}", [("m", 0, 1)], tokens=(300, 10 * number)) for number in range(1, 41)]
    workload, profiles = aggregate(runs), {"m": make_profile("m")}
    return predict(workload, profiles, CLUSTER, {"m": ONE}, rate_rps=1e-6), workload, profiles


def test_percentiles_are_those_of_the_traced_lengths(planned):
    plan, workload, profiles = planned
    found = predict_latencies(plan, workload, profiles, rate_rps=1e-6)
    alone = replay(plan, profiles, workload.timelines, np.arange(40) * 1000.0)
    assert found is not None
    assert found.mean_s == pytest.approx(plan.prediction.latency_s)
    # Of 40 lengths in steps of ten tokens: the 20th, the 38th and the 40th.
    for column, number in (("p50_s", 20), ("p95_s", 38), ("p99_s", 40)):
        assert getattr(found, column) == pytest.approx(alone.latencies_s[number - 1], rel=0.02)


def test_weights_move_percentiles(make_execution, make_profile):
    runs = [make_execution(name, [("m", 0, 1)], workflow=name, tokens=(9, tokens)) for name, tokens in LENGTHS.items()]
    profiles = {"m": make_profile("m")}
    for rates, is_long in (({"short": 1.0, "long": 9.0}, True), ({"short": 9.0, "long": 1.0}, False)):
        workload = aggregate(runs, rates_rps=rates)
        plan = predict(workload, profiles, CLUSTER, {"m": ONE}, rate_rps=1e-6)
        found = predict_latencies(plan, workload, profiles, rate_rps=1e-6)
        assert found is not None
        # A second of each is no LLM's.
        assert (found.p50_s > 3) == is_long
        assert found.p95_s > 3


def test_beyond_saturation_nothing_finite_is_told(planned):
    plan, workload, profiles = planned
    assert predict_latencies(plan, workload, profiles, rate_rps=1e6) is None


def test_what_the_plan_or_the_profile_does_not_know_is_refused(planned, make_execution):
    plan, _, profiles = planned
    other = aggregate([make_execution("e", [("x", 0, 1)], tokens=(9, 9))])
    with pytest.raises(ScepsyError, match="no LLM 'x'"):
        predict_latencies(plan, other, profiles | {"x": profiles["m"]}, rate_rps=1.0)
    longer = aggregate([make_execution("e", [("m", 0, 1)], tokens=(40_000, 9))])
    with pytest.raises(ScepsyError, match="reach 40,009 tokens"):
        predict_latencies(plan, longer, profiles, rate_rps=1.0)
