import asyncio
import os

import pytest

from scepsy.deployment import vllm_cpu_specs
from scepsy.deployment.fleet import Turns
from scepsy.deployment.state import Order


def order(engine, plan):
    return Order(
        name="x",
        engine=engine,
        host="",
        port=0,
        specs=vllm_cpu_specs(plan, ports=range(1, 20), cores=range(16)),
        start_timeout_s=1,
        grace_s=1,
        drain_s=1,
    )


@pytest.fixture
def many_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)))


async def together(order):
    """Let all replicas start; returns the pairs that did so at the same time."""
    turns = Turns(order.engine)
    starting, overlaps = set(), set()

    async def start(spec):
        async with turns.of(spec)():
            overlaps.update(frozenset((spec.id, other)) for other in starting)
            starting.add(spec.id)
            await asyncio.sleep(0.005)
            starting.remove(spec.id)

    await asyncio.gather(*(start(spec) for spec in order.specs))
    return {tuple(sorted(pair)) for pair in overlaps}


async def test_only_those_of_different_devices_start_together(make_plan, make_part, many_cores):
    plan = make_plan(
        make_part("a", (0, 1), (2, 3)), make_part("b", 1, fraction=0.5), make_part("c", 1), cluster="4xCPU"
    )
    overlaps = await together(order("vllm-cpu", plan))
    assert ("a-0", "a-1") in overlaps
    assert not {("a-0", "b-0"), ("a-0", "c-0"), ("b-0", "c-0")} & overlaps


async def test_emulators_share_nothing(make_plan, make_part, many_cores):
    plan = make_plan(make_part("a", 0, fraction=0.5), make_part("b", 0, fraction=0.5), cluster="4xCPU")
    assert await together(order("emulator", plan)) == {("a-0", "b-0")}


async def test_a_small_machine_starts_real_engines_singly(make_plan, make_part, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {0, 1})
    plan = make_plan(make_part("a", 0, 1, 2), cluster="4xCPU")
    assert await together(order("vllm-cpu", plan)) == set()
    assert await together(order("vllm", plan)) == set()
