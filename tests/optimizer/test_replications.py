"""Replays at recorded moments."""

from dataclasses import replace
from fractions import Fraction

import pytest

from scepsy_optimizer.allocation import Choice
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.planner import hand_made_plan
from scepsy_optimizer.replications import recorded_rate_rps, replay_recorded

ONE = (Choice(tensor_parallel_size=1, fraction=Fraction(1), replicas=1),)


@pytest.fixture
def profiles(make_profile):
    return {"m": make_profile("m")}


@pytest.fixture
def plan(profiles):
    return hand_made_plan({"m": ONE}, profiles, parse_cluster("1xH100"))


def recorded(make_execution, gap_s, count=12):
    """Executions of one call each, listed backwards, that start `gap_s` apart."""
    runs = [make_execution(f"e{number}", [("m", 0, 1)], tokens=(100, 50)) for number in range(count)]
    return [replace(run, started_ns=10**18 + int(gap_s * 1e9) * number) for number, run in enumerate(runs)][::-1]


def test_starts_decide_who_meets_whom(make_execution, plan, profiles):
    apart, close = (recorded(make_execution, gap_s) for gap_s in (100.0, 0.05))
    alone, crowded = (replay_recorded(plan, profiles, runs) for runs in (apart, close))
    assert alone.runs == 1
    assert alone.executions == 12
    assert alone.rate_rps == pytest.approx(0.01)
    # Far apart they all take the same.
    assert alone.p99_s.value == pytest.approx(alone.mean_s.value)
    assert crowded.mean_s.value > 1.01 * alone.mean_s.value
    # Their order in the list says nothing.
    assert replay_recorded(plan, profiles, close[::-1]) == crowded


def test_another_rate_stretches_the_time_between(make_execution, plan, profiles):
    apart, close = (recorded(make_execution, gap_s) for gap_s in (100.0, 0.05))
    faster = replay_recorded(plan, profiles, apart, rate_rps=20.0)
    assert faster.rate_rps == pytest.approx(recorded_rate_rps(close))
    assert faster.mean_s.value == pytest.approx(replay_recorded(plan, profiles, close).mean_s.value)


def test_executions_that_do_not_tell_their_moments_are_refused(make_execution):
    runs = recorded(make_execution, 1.0)
    with pytest.raises(ScepsyError, match="1 of 12 executions do not say when they started"):
        recorded_rate_rps([replace(runs[0], started_ns=0), *runs[1:]])
    with pytest.raises(ScepsyError, match="all 12 executions started at the same moment"):
        recorded_rate_rps(recorded(make_execution, 0.0))
    with pytest.raises(ScepsyError, match="9 executions are too few"):
        recorded_rate_rps(runs[:9])
