from collections import Counter
from dataclasses import replace
from fractions import Fraction
from itertools import permutations
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy_optimizer.cluster import Cluster, parse_cluster
from scepsy_optimizer.move_order import Occupation, order_steps
from scepsy_optimizer.moves import describe_moves, plan_moves
from scepsy_optimizer.plan import LLMPlan, Plan, Slot

CLUSTER = parse_cluster("2x2xH100")


def part(llm, slots, fraction=1.0, **more):
    slots = tuple(Slot(node=f"node{node}", devices=devices) for node, devices in slots)
    settings_ = {
        "model": llm,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
        "gpu_memory_utilization": 0.9,
        **more,
    }
    return LLMPlan(
        llm=llm,
        tensor_parallel_size=len(slots[0].devices),
        fraction=fraction,
        replicas=len(slots),
        slots=slots,
        **settings_,
    )


def plan(*parts, cluster=CLUSTER):
    return Plan(cluster=cluster, rate_rps=1, llms=parts)


def engines(plan_):
    """Every replica as (engine settings, node, devices)."""
    return Counter(
        (one.llm, one.fraction, one.max_num_seqs, slot.node, frozenset(slot.devices))
        for one in plan_.llms
        for slot in one.slots
    )


def carry_out(old, moves):
    """Follow the steps; devices never beyond their whole, interruptions as told; returns what runs in the end."""
    running = engines(old)
    gone = {one.llm for one in old.llms} - {step.engine.llm for step in moves.steps if step.action == "start"}
    gone -= {engine.llm for engine, _ in moves.stay}
    for step in moves.steps:
        key = (
            step.engine.llm,
            float(step.engine.fraction),
            step.engine.max_num_seqs,
            step.slot.node,
            frozenset(step.slot.devices),
        )
        if step.action == "start":
            running[key] += 1
        else:
            assert running[key] > 0
            running[key] -= 1
        running = +running
        used = Counter()
        for (_, fraction, _, node, devices), count in running.items():
            for device in devices:
                used[node, device] += round(fraction * count * 10)
        assert max(used.values(), default=0) <= 10
        left = sum(count for one, count in running.items() if one[0] == step.engine.llm)
        assert step.interrupts == (step.action == "stop" and left == 0 and step.engine.llm not in gone)
    return running


@st.composite
def plans(draw):
    """Whatever fits on the four devices, at tensor parallelism 1 and 2 and by halves."""
    free = {(node, device): 2 for node in range(2) for device in range(2)}
    found = {}
    for llm, kind, node, device in draw(
        st.lists(
            st.tuples(
                st.sampled_from("abc"), st.sampled_from(["pair", "one", "half"]), st.integers(0, 1), st.integers(0, 1)
            ),
            min_size=1,
            max_size=6,
        )
    ):
        devices = (0, 1) if kind == "pair" else (device,)
        need = 1 if kind == "half" else 2
        if all(free[node, each] >= need for each in devices):
            for each in devices:
                free[node, each] -= need
            found.setdefault((llm, kind), []).append((node, devices))
    seqs = draw(st.sampled_from([8, 8, 8, 16]))
    return plan(
        *[
            part(llm, slots, 0.5 if kind == "half" else 1.0, max_num_seqs=seqs)
            for (llm, kind), slots in sorted(found.items())
        ]
    )


@settings(max_examples=150, deadline=None)
@given(plans(), plans())
def test_the_steps_lead_from_the_old_plan_to_the_new_one(old, new):
    moves = plan_moves(old, new)
    assert carry_out(old, moves) == engines(new)
    stay = engines(old) & engines(new)
    assert len(moves.stay) == sum(stay.values())
    temporary = sum(step.temporary and step.action == "start" for step in moves.steps)
    # As few restarts as can be: whatever has no equal on its devices has to be started.
    assert moves.restarts - temporary == sum((engines(new) - engines(old)).values())
    assert len(describe_moves(moves)) == len(moves.steps)


def occupations(plan_):
    return [
        Occupation(
            llm=one.llm,
            part=Fraction(one.fraction),
            devices=frozenset((slot.node, device) for device in slot.devices),
        )
        for one in plan_.llms
        for slot in one.slots
    ]


def some_order_serves_all(stops, starts):
    wanted = {one.llm for one in starts}
    for order in permutations([*((0, one) for one in stops), *((1, one) for one in starts)]):
        served, used, fine = Counter(one.llm for one in stops), Counter(), True
        for one in stops:
            used.update(dict.fromkeys(one.devices, one.part))
        for start, one in order:
            for device in one.devices:
                used[device] += one.part if start else -one.part
            served[one.llm] += 1 if start else -1
            fine = fine and max(used.values()) <= 1 and (served[one.llm] > 0 or one.llm not in wanted)
            if not fine:
                break
        if fine:
            return True
    return False


@settings(max_examples=100, deadline=None)
@given(plans(), plans())
def test_an_order_that_serves_all_is_found_where_there_is_one(old, new):
    stops, starts = occupations(old), occupations(new)
    if len(stops) + len(starts) > 6:
        return
    steps = order_steps(stops, starts, [])
    assert sorted((step.start, step.index) for step in steps) == [
        *((False, index) for index in range(len(stops))),
        *((True, index) for index in range(len(starts))),
    ]
    assert any(step.interrupts for step in steps) == (not some_order_serves_all(stops, starts))


def test_nothing_changes():
    old = plan(part("a", [(0, (0, 1))]))
    # Ranks in another order, a new rate and a new prediction restart nothing.
    new = plan(part("a", [(0, (1, 0))], rate_rps=3.0, predicted_call_s=1.0, share=0.3))
    moves = plan_moves(old, new)
    assert moves.steps == ()
    assert moves.restarts == 0
    assert len(moves.stay) == 1


@pytest.mark.parametrize("change", [{"model": "other"}, {"max_num_seqs": 9}, {"gpu_memory_utilization": 0.8}])
def test_another_setting_restarts_in_place(change):
    moves = plan_moves(plan(part("a", [(0, (0,)), (0, (1,))])), plan(part("a", [(0, (0,)), (0, (1,))], **change)))
    assert [step.action for step in moves.steps] == ["stop", "start", "stop", "start"]
    assert moves.interrupted == ()


def test_a_swap_takes_a_temporary_replica_where_a_device_is_free():
    old = plan(part("a", [(0, (0,))]), part("b", [(0, (1,))]))
    new = plan(part("a", [(0, (1,))]), part("b", [(0, (0,))]))
    moves = plan_moves(old, new)
    assert moves.interrupted == ()
    assert moves.restarts == 3
    assert carry_out(old, moves) == engines(new)
    assert describe_moves(moves)[0] == "b: start a temporary replica on node1: 0"
    assert "b: start tensor_parallel_size 1 on node0: 0, moved from node0: 1" in describe_moves(moves)
    full = [part("c", [(1, (0,)), (1, (1,))])]
    crowded = plan_moves(plan(*old.llms, *full), plan(*new.llms, *full))
    assert len(crowded.interrupted) == 1
    assert crowded.restarts == 2
    assert sum("(interrupts" in line for line in describe_moves(crowded)) == 1


@settings(max_examples=150, deadline=None)
@given(plans(), plans())
def test_every_temporary_replica_saves_an_llm_from_interruption(old, new):
    moves = plan_moves(old, new)
    with patch("scepsy_optimizer.moves._free_slots", return_value=[]):
        without = plan_moves(old, new)
    started = [step.engine.llm for step in moves.steps if step.temporary and step.action == "start"]
    assert not any(step.temporary for step in without.steps)
    assert len(moves.interrupted) + len(started) <= len(without.interrupted)
    assert len(set(started)) == len(started)
    assert not set(started) & set(moves.interrupted)
    assert sorted(started) == sorted(
        step.engine.llm for step in moves.steps if step.temporary and step.action == "stop"
    )


@pytest.mark.parametrize("fraction", [0.3, 0.1, 0.001])
def test_no_temporary_replica_on_devices_that_the_only_new_one_waits_for(fraction):
    cluster = parse_cluster("4xH100")
    old = plan(part("a", [(0, (0,))], fraction), part("b", [(0, (2, 3))]), cluster=cluster)
    new = plan(part("a", [(0, (0, 1))]), part("b", [(0, (2, 3))]), cluster=cluster)
    moves = plan_moves(old, new)
    assert moves.interrupted == ("a",)
    assert [(step.action, step.temporary) for step in moves.steps] == [("stop", False), ("start", False)]
    # With a device to spare it is bridged, once.
    spare = plan_moves(replace(old, llms=old.llms[:1]), replace(new, llms=new.llms[:1]))
    assert spare.interrupted == ()
    assert spare.restarts == 2


def test_no_temporary_replica_that_another_llm_would_be_interrupted_for():
    cluster = parse_cluster("3xH100")
    old = plan(part("a", [(0, (0,))]), part("b", [(0, (1,))]), cluster=cluster)
    new = plan(part("a", [(0, (1,))]), part("b", [(0, (0, 2))]), cluster=cluster)
    moves = plan_moves(old, new)
    assert len(moves.interrupted) == 1
    assert moves.restarts == 2


def test_a_temporary_replica_goes_before_another_llm_needs_its_device():
    cluster = parse_cluster("4xH100")
    old = plan(part("a", [(0, (0,))]), part("b", [(0, (1,))]), part("c", [(0, (3,))]), cluster=cluster)
    new = plan(part("a", [(0, (1,))]), part("b", [(0, (0,))]), part("c", [(0, (2,))]), cluster=cluster)
    moves = plan_moves(old, new)
    assert moves.interrupted == ()
    assert moves.restarts == 4
    assert carry_out(old, moves) == engines(new)


def test_a_temporary_replica_goes_before_a_second_new_one_of_its_llm_needs_its_device():
    cluster = parse_cluster("6xH100")
    old = plan(
        part("a", [(0, (0,))], 0.5),
        part("b", [(0, (3, 4))]),
        part("c", [(0, (1,))]),
        part("d", [(0, (2,))], 0.5),
        cluster=cluster,
    )
    new = plan(
        part("a", [(0, (1,))]),
        part("a", [(0, (2, 3))]),
        part("b", [(0, (0,))]),
        part("c", [(0, (4,))]),
        part("d", [(0, (5,))], 0.5),
        cluster=cluster,
    )
    moves = plan_moves(old, new)
    assert moves.interrupted == ()
    assert moves.restarts == 6
    assert carry_out(old, moves) == engines(new)


def test_many_temporary_replicas_are_found_in_time():
    cluster = parse_cluster("16x8xH100")
    places = [(node, (device,)) for node in range(16) for device in range(8)]
    # Fifty-six pairs of LLMs change places; of the sixteen devices left each can bridge one of them.
    old = plan(*[part(f"m{index}", [places[index]]) for index in range(112)], cluster=cluster)
    new = plan(*[part(f"m{index}", [places[index ^ 1]]) for index in range(112)], cluster=cluster)
    moves = plan_moves(old, new)
    assert len(moves.interrupted) <= 40
    assert moves.restarts + len(moves.interrupted) <= 112 + 56
    assert carry_out(old, moves) == engines(new)


def test_moves_go_the_shortest_way():
    cluster = parse_cluster("3x4xH100")
    nodes = tuple(replace(node, switch="xxy"[index]) for index, node in enumerate(cluster.nodes))
    cluster = Cluster(nodes=nodes)
    old = plan(part("a", [(0, (0,)), (1, (0,)), (2, (0,))]), cluster=cluster)
    new = plan(part("a", [(0, (1,)), (0, (2,)), (2, (1,))]), cluster=cluster)
    partners = {
        (step.slot.node, step.slot.devices): step.partner.node
        for step in plan_moves(old, new).steps
        if step.action == "start"
    }
    assert sorted(partners.values()) == ["node0", "node1", "node2"]
    assert partners["node2", (1,)] == "node2"


def test_devices_that_are_gone_and_llms_that_are_given_up():
    big, small = parse_cluster("2x2xH100"), parse_cluster("2xH100")
    old = plan(part("a", [(0, (0,)), (1, (0,))]), part("b", [(0, (1,))]), cluster=big)
    new = plan(part("a", [(0, (0,)), (0, (1,))]), cluster=small)
    moves = plan_moves(old, new)
    assert [describe for describe in describe_moves(moves) if describe.startswith("b")] == [
        "b: stop tensor_parallel_size 1 on node0: 1"
    ]
    assert moves.interrupted == ()
    assert moves.restarts == 1
    assert carry_out(old, moves) == engines(new)
    half = plan(part("a", [(0, (0,))], 0.5), cluster=small)
    assert "a: start 0.5 device on node0: 0.5 of 0" in describe_moves(plan_moves(old, half))


def test_many_moves_are_ordered_in_time():
    cluster = parse_cluster("16x8xH100")
    left = [(node, (device,)) for node in range(16) for device in range(4)]
    right = [(node, (device,)) for node in range(16) for device in range(4, 8)]
    old = plan(part("a", left), part("b", right), cluster=cluster)
    new = plan(part("a", right), part("b", left), cluster=cluster)
    moves = plan_moves(old, new)
    assert moves.restarts == 128
    assert moves.interrupted == ()
    assert carry_out(old, moves) == engines(new)
