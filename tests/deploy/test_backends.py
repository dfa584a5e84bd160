import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy.deployment.backends import Backend, NoBackendError, Pool


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
