from dataclasses import replace
from fractions import Fraction
from math import inf, nan

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scepsy_optimizer.allocation import Choice
from scepsy_optimizer.baselines import even_split
from scepsy_optimizer.cluster import Cluster, Node, parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.judging import least_replayed
from scepsy_optimizer.placement import check_placement, place, require_placed
from scepsy_optimizer.plan import LLMPlan, Plan, Slot
from scepsy_optimizer.planner import describe_choices, hand_made_plan, optimize, plan_choices, predict
from scepsy_optimizer.replay import poisson_arrivals_s, replay
from scepsy_optimizer.steady_state import replay_steady_state
from scepsy_optimizer.workload import aggregate


def whole(size, replicas=1):
    return (Choice(tensor_parallel_size=size, fraction=Fraction(1), replicas=replicas),)


def part(tenths, replicas=1):
    return (Choice(tensor_parallel_size=1, fraction=Fraction(tenths, 10), replicas=replicas),)


def bare_plan(cluster, choices, slots):
    return Plan(
        cluster=cluster,
        rate_rps=1,
        llms=tuple(
            LLMPlan(
                llm=llm,
                model=llm,
                tensor_parallel_size=choice.tensor_parallel_size,
                fraction=float(choice.fraction),
                replicas=choice.replicas,
                slots=placed,
                max_num_seqs=1,
                max_num_batched_tokens=1,
                max_model_len=1,
                gpu_memory_utilization=0.9,
            )
            for llm, groups in choices.items()
            for choice, placed in zip(groups, slots[llm], strict=True)
        ),
    )


def test_groups_first_then_fractions_on_shared_devices():
    cluster = parse_cluster("2x4xH100")
    choices = {"a": whole(4), "b": whole(2), "c": part(5, 2), "d": part(2, 3)}
    slots = place(choices, cluster)
    assert slots is not None
    assert slots["a"][0] == (Slot(node="node0", devices=(0, 1, 2, 3)),)
    assert slots["b"][0] == (Slot(node="node1", devices=(0, 1)),)
    assert {slot.devices for slot in slots["c"][0]} == {(2,)}
    assert {slot.devices for slot in slots["d"][0]} == {(3,)}
    assert check_placement(bare_plan(cluster, choices, slots)) == []


def test_a_group_does_not_cross_domains():
    assert place({"a": whole(2)}, parse_cluster("4xL40S")) is None
    assert place({"a": whole(4)}, parse_cluster("2x2xH100")) is None


@given(
    st.lists(st.sampled_from([whole(4), whole(2), whole(1), part(5), part(2), part(1)]), min_size=1, max_size=40),
    st.integers(1, 3),
)
def test_offered_sizes_pack_without_loss(pieces, nodes):
    """Groups of powers of two and fractions of 1/2, 1/5 and 1/10 always fill nodes of four whole devices."""
    cluster = parse_cluster(f"{nodes}x4xH100")
    choices = {str(index): choice for index, choice in enumerate(pieces)}
    slots = place(choices, cluster)
    fits = sum(choice.units for (choice,) in pieces) <= cluster.devices * 10
    assert (slots is not None) == fits
    if slots is not None:
        assert check_placement(bare_plan(cluster, choices, slots)) == []


def test_check_placement_tells_every_fault():
    cluster = Cluster(
        nodes=(Node(name="n", device_type="H100", devices=4, memory_gib=80, nvlink_domains=((0, 1), (2, 3))),)
    )
    choices = {"a": whole(2), "b": part(5, 3), "c": whole(1, 2)}
    slots = {
        "a": ((Slot(node="n", devices=(1, 2)),),),
        "b": (tuple(Slot(node="n", devices=(3,)) for _ in range(3)),),
        "c": ((Slot(node="x", devices=(0,)), Slot(node="n", devices=(9,))),),
    }
    wrong = check_placement(bare_plan(cluster, choices, slots))
    assert len(wrong) == 4
    assert any("do not share a fast-link domain" in line for line in wrong)
    assert any("device 3 of 'n' is given out 1.5 times" in line for line in wrong)
    assert any("no node 'x'" in line for line in wrong)
    assert any("no number 9" in line for line in wrong)


def test_what_cannot_be_placed_as_it_says_is_refused_by_all_who_start_it():
    cluster = parse_cluster("4xL40S")
    choices = {"a": whole(2), "b": part(5)}

    def planned(a, b):
        slots = {llm: ((Slot(node="node0", devices=one),),) for llm, one in (("a", a), ("b", b))}
        return bare_plan(cluster, choices, slots)

    # Across domains a group is slow, but it runs.
    assert len(check_placement(planned((0, 1), (2,)))) == 1
    require_placed(planned((0, 1), (2,)))
    with pytest.raises(ScepsyError, match=r"^plan: device 1 of 'node0' is given out 1.5 times, to 'a', 'b'; correct"):
        require_placed(planned((0, 1), (1,)))
    with pytest.raises(ScepsyError, match=r"'a' replica 0: names a device twice \(and 1 more, see scepsy plan show\);"):
        require_placed(planned((0, 0), (1,)))
    with pytest.raises(ScepsyError, match=r"'a' replica 0: node 'node0' has 4 devices from 0 on, no number 9"):
        require_placed(planned((0, 9), (1,)))
    greedy = replace(planned((0, 1), (2,)), llms=(replace(planned((0, 1), (2,)).llms[1], gpu_memory_utilization=1.2),))
    with pytest.raises(ScepsyError, match=r"'b' replica 0: takes 1.2 of its part of the memory of node 'node0'"):
        require_placed(greedy)


@pytest.fixture(scope="module")
def workload(make_execution):
    runs = [
        make_execution(f"e{n}", [("a", 0, 2 + n % 3), ("a", 0, 3), ("b", 5, 7)], workflow="wx"[n % 2])
        for n in range(10)
    ]
    return aggregate(runs)


@pytest.fixture(scope="module")
def profiles(make_profile):
    return {"a": make_profile("a"), "b": make_profile("b", scale=0.5, weights_gib=4.0)}


def test_a_plan_can_be_placed_and_says_what_it_gives(workload, profiles):
    cluster = parse_cluster("4xH100")
    plan = optimize(workload, profiles, cluster, rate_rps=3.0, provenance={"traces": "made up"})
    assert check_placement(plan) == []
    prediction = plan.prediction
    assert prediction is not None
    assert 0 < prediction.lower_bound_s <= prediction.latency_s
    assert prediction.gap == pytest.approx(1 - prediction.lower_bound_s / prediction.latency_s)
    assert prediction.max_rate_rps >= 3.0
    assert prediction.bottleneck in {"a", "b"}
    assert set(prediction.workflow_latency_s) == {"w", "x"}
    mean = sum(prediction.workflow_latency_s.values()) / 2
    assert prediction.latency_s == pytest.approx(mean)
    again = predict(workload, profiles, cluster, plan_choices(plan), rate_rps=3.0)
    assert again.prediction is not None
    assert again.prediction.latency_s == pytest.approx(prediction.latency_s)


def test_a_replayed_plan_has_percentiles_near_its_prediction(workload, profiles):
    cluster = parse_cluster("4xH100")
    plan = optimize(workload, profiles, cluster, rate_rps=6.0, replay_seed=1)
    prediction = plan.prediction
    assert prediction is not None
    assert prediction.replayed is not None
    assert prediction.replayed.mean_s == pytest.approx(prediction.latency_s, rel=0.1)
    assert prediction.replayed.p50_s <= prediction.replayed.p95_s <= prediction.replayed.p99_s
    assert prediction.replayed.executions > 300
    assert plan == optimize(workload, profiles, cluster, rate_rps=6.0, replay_seed=1)
    rng = np.random.default_rng(1)
    assert replay_steady_state(plan, profiles, workload, rng=rng, max_calls=100) is None


def test_the_plan_is_at_least_as_good_as_an_even_split(workload, profiles):
    cluster = parse_cluster("4xH100")
    even = even_split(["a", "b"], profiles, devices=4, max_tensor_parallel_size=4)
    for rate in (0.5, 5.0, 10.0):
        ours = optimize(workload, profiles, cluster, rate_rps=rate).prediction
        theirs = predict(workload, profiles, cluster, even, rate_rps=rate).prediction
        assert ours is not None
        assert theirs is not None
        assert ours.latency_s <= theirs.latency_s * (1 + 1e-9)


def test_a_hand_made_plan_needs_no_workload(profiles):
    plan = hand_made_plan({"a": whole(2), "b": part(5, 2)}, profiles, parse_cluster("4xH100"))
    assert check_placement(plan) == []
    assert plan.prediction is None
    assert plan.parts("b")[0].max_model_len <= plan.parts("a")[0].max_model_len == 32768
    with pytest.raises(ScepsyError, match="does not fit on 1 devices"):
        hand_made_plan({"a": whole(2)}, profiles, parse_cluster("1xH100"))


def test_domains_that_groups_do_not_fill_lead_to_a_smaller_plan(workload, make_profile):
    """Domains of three devices hold one pair each: what the search wants at first cannot be placed."""
    nodes = tuple(
        Node(name=f"n{i}", device_type="H100", devices=3, memory_gib=80, nvlink_domains=((0, 1, 2),)) for i in range(2)
    )
    profiles = {llm: make_profile(llm, sizes=(2,)) for llm in "ab"}
    plan = optimize(workload, profiles, Cluster(nodes=nodes), rate_rps=1.0)
    assert check_placement(plan) == []
    assert plan.prediction is not None
    assert plan.prediction.lower_bound_s <= plan.prediction.latency_s


def test_an_unreachable_rate_names_the_highest_and_its_bottleneck(workload, profiles):
    with pytest.raises(
        ScepsyError, match=r"a rate of 1000 executions/s is out of reach on 1 H100: the highest is .*'a'"
    ):
        optimize(workload, profiles, parse_cluster("1xH100"), rate_rps=1000)


def test_wrong_inputs_are_told(workload, profiles):
    with pytest.raises(ScepsyError, match="for H100, the cluster has A100"):
        optimize(workload, profiles, parse_cluster("8xA100"), rate_rps=1)
    with pytest.raises(ScepsyError, match="no profile for a; there are profiles for b"):
        optimize(workload, {"b": profiles["b"]}, parse_cluster("8xH100"), rate_rps=1)
    cluster = parse_cluster("1xH100")
    with pytest.raises(ScepsyError, match="gives nothing to b"):
        predict(workload, profiles, cluster, {"a": whole(1)}, rate_rps=1)
    with pytest.raises(
        ScepsyError, match="does not fit on 1 devices: a: 1 x tensor_parallel_size 1; b: 1 x 0.5 device"
    ):
        predict(workload, profiles, cluster, {"a": whole(1), "b": part(5)}, rate_rps=1)
    with pytest.raises(ScepsyError, match=r"'a' .* does not fit into 0.1 of 1 H100"):
        predict(workload, profiles, cluster, {"a": part(1), "b": part(5)}, rate_rps=1)
    for text in ("8", "8xZ9", "0xH100", "H100x8", "2x0xH100"):
        with pytest.raises(ScepsyError, match="cluster"):
            parse_cluster(text)
    assert describe_choices({"a": part(5, 2)}) == "a: 2 x 0.5 device"


def test_a_plan_checks_itself(workload, profiles):
    plan = optimize(workload, profiles, parse_cluster("4xH100"), rate_rps=1)
    with pytest.raises(ScepsyError, match="two groups of equal replicas"):
        replace(plan, llms=(plan.llms[0], plan.llms[0]))
    with pytest.raises(ScepsyError, match="slots"):
        replace(plan, llms=(replace(plan.llms[0], replicas=9),))
    with pytest.raises(ScepsyError, match="fraction 2"):
        replace(plan, llms=(replace(plan.llms[0], fraction=2.0),))
    with pytest.raises(ScepsyError, match="no LLM 'z'"):
        plan.parts("z")
    with pytest.raises(ScepsyError, match="plan: has no LLMs; name at least one"):
        replace(plan, llms=())
    for rate_rps in (-1.0, nan, inf):
        with pytest.raises(ScepsyError, match=f"plan: has rate_rps {rate_rps}; it must be finite"):
            replace(plan, rate_rps=rate_rps)


@pytest.mark.parametrize(
    ("name", "wrong", "told"),
    [
        *(("gpu_memory_utilization", value, "above 0 and at most 1") for value in (nan, inf, 0.0, -1.0)),
        *((name, nan, "finite and at least 0") for name in ("rate_rps", "utilisation", "share", "replica_rps")),
        *((name, -1.0, "finite and at least 0") for name in ("rate_rps", "utilisation", "share", "replica_rps")),
        ("replica_rps", inf, "finite and at least 0"),
        ("predicted_call_s", nan, "at least 0"),
        ("max_num_seqs", -3, "at least 1"),
        ("max_num_batched_tokens", -1, "at least 1"),
        ("max_model_len", -1, "at least 0"),
        ("replicas", 0, "at least 1"),
        ("tensor_parallel_size", 0, "at least 1"),
    ],
)
def test_a_group_refuses_numbers_that_mean_nothing(profiles, name, wrong, told):
    (found,) = hand_made_plan({"a": whole(1)}, profiles, parse_cluster("1xH100")).llms
    with pytest.raises(ScepsyError) as caught:
        replace(found, **{name: wrong})
    assert str(caught.value) == f"plan: 'a' has {name} {wrong}; it must be {told}"


def test_a_fraction_is_of_one_device(profiles):
    (found,) = hand_made_plan({"a": whole(2)}, profiles, parse_cluster("2xH100")).llms
    with pytest.raises(ScepsyError, match=r"'a' has tensor_parallel_size 2 with fraction 0.5; only whole devices"):
        replace(found, fraction=0.5)
    assert replace(found, predicted_call_s=inf).predicted_call_s == inf


@pytest.mark.parametrize("load", [0.2, 0.7])
@pytest.mark.parametrize(
    "groups",
    [whole(1) + part(2), whole(2) + part(5) + part(2), whole(4) + whole(1)],
    ids=["fifth", "half and fifth", "tensor parallelism"],
)
def test_a_mix_of_replicas_is_as_fast_as_its_replay(make_execution, profiles, groups, load):
    runs = [make_execution(f"e{n}", [("b", 0, 2), ("b", 2, 4)], tokens=(300 + 40 * n, 60 + 10 * n)) for n in range(20)]
    workload, cluster = aggregate(runs), parse_cluster("8xH100")
    light = predict(workload, profiles, cluster, {"b": groups}, rate_rps=1e-3).prediction
    rate_rps = load / 0.85 * light.max_rate_rps
    plan = predict(workload, profiles, cluster, {"b": groups}, rate_rps=rate_rps)
    assert [part.replicas for part in plan.parts("b")] == [group.replicas for group in groups]
    assert sum(part.rate_rps for part in plan.parts("b")) == pytest.approx(2 * rate_rps)
    rng = np.random.default_rng(3)
    timelines = [workload.timelines[index] for index in rng.integers(0, 20, 800)]
    replayed = replay(plan, profiles, timelines, poisson_arrivals_s(rng, rate_rps=rate_rps, executions=800))
    assert plan.prediction.latency_s == pytest.approx(replayed.latencies_s[80:-80].mean(), rel=0.05)


def test_plans_are_judged_under_the_same_arrivals(workload, profiles):
    """The faster of two plans replays faster under any arrivals that are the same for both, in either order."""
    cluster = parse_cluster("8xH100")
    llms = [demand.llm for demand in workload.demands]
    small, large = (
        predict(workload, profiles, cluster, dict.fromkeys(llms, whole(1, replicas)), rate_rps=6.0)
        for replicas in (1, 2)
    )
    for seed in range(3):
        assert least_replayed([small, large], profiles, workload, seed) == large
        assert least_replayed([large, small], profiles, workload, seed) == large
