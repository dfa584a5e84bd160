import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy.deployment.affinity import Affinity, score
from scepsy.deployment.backends import Backend, NoBackendError, Pool
from scepsy_optimizer.errors import ScepsyError


def backend(name, **changes):
    return Backend(**{"id": name, "llm": "m", "url": "", "ready": True, **changes})


def test_the_least_loaded_takes_the_next():
    pool = Pool([backend("a", outstanding=2), backend("b", outstanding=1), backend("c", ready=False)])
    assert pool.choose().id == "b"
    assert pool.choose({"b"}).id == "a"
    assert pool.choose({"a", "b"}) is None


def test_equals_take_turns():
    pool = Pool([backend("a"), backend("b"), backend("c")])
    assert sorted(pool.choose().id for _ in range(3)) == ["a", "b", "c"]


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.1, 0.2, 0.5, 1.0]), min_size=1, max_size=6), st.integers(1, 300))
def test_standing_load_is_in_proportion_to_weight(weights, requests):
    pool = Pool([backend(str(index), weight=weight) for index, weight in enumerate(weights)])
    for _ in range(requests):
        pool.choose().outstanding += 1
    # Whoever took a request took it as the cheapest place: nobody else could have had it for less.
    for one in pool.backends:
        for other in pool.backends:
            assert one.outstanding / one.weight <= (other.outstanding + 1) / other.weight + 1e-9


async def test_waiting_is_bounded_in_time_and_number():
    pool = Pool([backend("a", ready=False)], wait_s=0.05, max_waiting=1)
    first = asyncio.create_task(pool.acquire())
    await asyncio.sleep(0)
    with pytest.raises(NoBackendError):
        await asyncio.wait_for(pool.acquire(), 0.02)
    with pytest.raises(NoBackendError):
        await first


async def test_who_waits_gets_the_first_ready_one():
    one = backend("a", ready=False)
    pool = Pool([one], wait_s=5)
    waiting = [asyncio.create_task(pool.acquire()) for _ in range(3)]
    await asyncio.sleep(0)
    one.ready = True
    pool.changed()
    assert [chosen.id for chosen in await asyncio.gather(*waiting)] == ["a"] * 3


async def test_nobody_waits_for_what_was_given_up():
    pool = Pool([backend("a", ready=False, failed=True)], wait_s=60)
    with pytest.raises(NoBackendError):
        await asyncio.wait_for(pool.acquire(), 1)


def test_a_key_stays_with_its_replica_while_others_come_and_go():
    pool = Pool([backend(name) for name in "abcd"])
    before = {str(key): pool.choose(key=str(key)).id for key in range(400)}
    assert {str(key): pool.choose(key=str(key)).id for key in range(400)} == before
    pool.remove(pool.backends[0])
    after = {key: pool.choose(key=key).id for key in before}
    assert all(after[key] == old for key, old in before.items() if old != "a")
    # And those that had to move are spread over all that is left.
    assert {after[key] for key, old in before.items() if old == "a"} == set("bcd")


def test_keys_are_spread_by_weight():
    pool = Pool([backend("a", weight=3.0), backend("b", weight=1.0)])
    chosen = [pool.choose(key=str(key)).id for key in range(2000)]
    assert chosen.count("a") / 2000 == pytest.approx(0.75, abs=0.05)


@given(st.lists(st.sampled_from([0.2, 0.5, 1.0]), min_size=1, max_size=5), st.integers(1, 200))
def test_a_favourite_never_gets_much_more_than_its_part(weights, requests):
    pool = Pool([backend(str(index), weight=weight) for index, weight in enumerate(weights)])
    for number in range(requests):
        pool.choose(key="always the same").outstanding += 1
        total = number + 1
        for one in pool.backends:
            assert one.outstanding <= 1.25 * total * one.weight / sum(weights) + 1


def test_a_replica_that_is_not_ready_or_was_tried_is_passed_over():
    pool = Pool([backend("a"), backend("b", ready=False)])
    assert {pool.choose(key=str(key)).id for key in range(50)} == {"a"}
    assert pool.choose({"a"}, key="k") is None


@given(st.text(), st.text(), st.floats(0.01, 100))
def test_a_score_is_a_positive_number_in_proportion_to_the_weight(key, name, weight):
    assert score(key, name, weight) > 0
    assert score(key, name, 2 * weight) == pytest.approx(2 * score(key, name, weight))


@pytest.mark.parametrize(
    ("text", "content", "expected"),
    [
        ("session:x-session", None, "s1"),
        ("session:x-other", {"prompt": "p"}, None),
        ("prefix", {"prompt": "p" * 5000}, "p" * 2048),
        ("prefix", {"messages": [{"role": "user", "content": "hi"}]}, '[{"role": "user", "content": "hi"}]'),
        ("prefix", {"prompt": [1, 2, 3]}, "[1, 2, 3]"),
        ("prefix", {"model": "m"}, None),
        ("prefix", None, None),
    ],
)
def test_what_requests_have_in_common(text, content, expected):
    assert Affinity.parsed(text).key({"x-session": "s1"}, content) == expected


@pytest.mark.parametrize("text", ["", "session:", "random"])
def test_an_affinity_that_is_none(text):
    with pytest.raises(ScepsyError, match="write session:HEADER"):
        Affinity.parsed(text)
