"""Time sharing: alone it is a device of one's own; in company, turns and switches add up."""

from fractions import Fraction

import pytest

from scepsy_optimizer.allocation import Choice
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.engine import Engine
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.planner import hand_made_plan
from scepsy_optimizer.replay import replay
from scepsy_optimizer.time_sharing import Turns, replay_time_shared
from scepsy_optimizer.timeline import compile_timeline


def drain(turns):
    now_s, ends_s = 0.0, {}
    while (stretch := turns.begin()) is not None:
        now_s += stretch.step_s * stretch.steps
        for request in turns.complete(stretch, stretch.steps):
            ends_s[request] = now_s
    return ends_s


def engines(make_profile, count):
    return [Engine(make_profile(f"m{index}"), tensor_parallel_size=1, fraction=1.0) for index in range(count)]


def alone_s(make_profile, *, prompt, output):
    (engine,) = engines(make_profile, 1)
    engine.submit("x", prompt_tokens=prompt, output_tokens=output)
    return drain(Turns([engine], turn_s=1.0, switch_s=9.0))["x"]


def test_one_llm_alone_is_an_engine(make_profile, make_execution):
    profiles = {"a": make_profile("a", request_s=0.01)}
    runs = [compile_timeline(make_execution(f"e{n}", [("a", 0, 2), ("a", 1, 3)])) for n in range(20)]
    arrivals_s = [0.3 * n for n in range(20)]
    cluster = parse_cluster("2xH100")
    plan = hand_made_plan({"a": (Choice(tensor_parallel_size=1, fraction=Fraction(1), replicas=2),)}, profiles, cluster)
    own = replay(plan, profiles, runs, arrivals_s)
    shared = replay_time_shared(profiles, runs, arrivals_s, devices=2, turn_s=0.05)
    assert shared.latencies_s == pytest.approx(own.latencies_s)


def test_whoever_ends_within_a_turn_costs_the_next_one_a_switch(make_profile):
    first, second = engines(make_profile, 2)
    first.submit("a", prompt_tokens=100, output_tokens=10)
    second.submit("b", prompt_tokens=100, output_tokens=10)
    ends_s = drain(Turns([first, second], turn_s=100.0, switch_s=2.0))
    one_s = alone_s(make_profile, prompt=100, output=10)
    assert ends_s["a"] == pytest.approx(one_s)
    assert ends_s["b"] == pytest.approx(2 * one_s + 2.0)


def test_turns_go_round_and_their_switches_add_up(make_profile):
    first, second = engines(make_profile, 2)
    first.submit("a", prompt_tokens=100, output_tokens=100)
    second.submit("b", prompt_tokens=100, output_tokens=100)
    one_s = alone_s(make_profile, prompt=100, output=100)
    turn_s, switch_s = one_s / 3.5, 0.2
    ends_s = drain(Turns([first, second], turn_s=turn_s, switch_s=switch_s))
    # The switch is part of the turn that it opens, so a turn gives less than its length.
    assert max(ends_s.values()) > 2 * one_s + 6 * switch_s
    rounds = (max(ends_s.values()) - 2 * one_s) / switch_s
    assert rounds == pytest.approx(round(rounds))


def test_an_llm_larger_than_a_device_is_refused(make_profile, make_execution):
    profiles = {"a": make_profile("a", weights_gib=100.0)}
    with pytest.raises(ScepsyError, match="does not fit"):
        replay_time_shared(profiles, [compile_timeline(make_execution("e", [("a", 0, 1)]))], [0.0], devices=2)
