import asyncio
import time

import pytest

from scepsy.emulator.pace import Pacer
from scepsy_optimizer.engine import Engine
from scepsy_optimizer.errors import ScepsyError


def offline(profile, requests):
    """When each request ends if all are there from the start, as the engine model says."""
    engine = Engine(profile, tensor_parallel_size=1, fraction=1.0)
    for index, (prompt, output) in enumerate(requests):
        engine.submit(index, prompt_tokens=prompt, output_tokens=output)
    now, ends = 0.0, {}
    while (stretch := engine.begin()) is not None:
        now += stretch.steps * stretch.step_s
        ends |= dict.fromkeys(engine.complete(stretch, stretch.steps), now)
    return ends


def pacer(profile):
    return Pacer(Engine(profile, tensor_parallel_size=1, fraction=1.0))


async def test_the_wall_clock_follows_the_model_without_drift(make_profile):
    profile = make_profile(max_num_seqs=4)
    requests = [(200, 20 + 10 * index) for index in range(8)]
    paced = pacer(profile)
    begin_s = asyncio.get_running_loop().time()
    generations = []
    # All at once for the engine: nothing is stepped before the last one is queued.
    first_step = paced._begin
    paced._begin = lambda start_s: None
    for prompt, output in requests:
        generations.append(paced.submit(prompt_tokens=prompt, output_tokens=output, arrived_s=begin_s))
    paced._begin = first_step
    paced._begin(begin_s)
    await asyncio.wait([generation.done for generation in generations])
    expected = offline(profile, requests)
    for index, generation in enumerate(generations):
        # The noted end is the model's to the last digit, whatever the scheduler of this machine did ...
        assert generation.finished_s - begin_s == pytest.approx(expected[index], abs=1e-6)
        assert begin_s < generation.first_token_s <= generation.finished_s
    # ... and the clock was not ahead of it.
    assert asyncio.get_running_loop().time() - begin_s >= max(expected.values()) - 0.002


async def test_a_late_loop_catches_up(make_profile):
    profile = make_profile()
    paced = pacer(profile)
    loop = asyncio.get_running_loop()
    begin_s = loop.time()
    generation = paced.submit(prompt_tokens=16, output_tokens=60, arrived_s=begin_s)
    time.sleep(0.15)  # noqa: ASYNC251 - the loop is to be late
    await asyncio.wait([generation.done])
    expected = offline(profile, [(16, 60)])[0]
    assert generation.finished_s - begin_s == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("streamed", [False, True])
async def test_arrivals_and_departures_in_the_middle_change_the_next_step(make_profile, streamed):
    """Stretches of steps cut short, or single steps for a stream: each request is timed as step by step."""
    profile = make_profile()
    loop = asyncio.get_running_loop()
    paced = pacer(profile)
    begin_s = loop.time()
    first = paced.submit(prompt_tokens=16, output_tokens=40, arrived_s=begin_s)
    left = paced.submit(prompt_tokens=16, output_tokens=400, arrived_s=begin_s, streamed=streamed)
    await asyncio.sleep(0.05)
    second = paced.submit(prompt_tokens=2000, output_tokens=10, arrived_s=loop.time())
    await asyncio.sleep(0.05)
    paced.abort(left)
    await asyncio.wait([first.done, second.done])
    # It was under way for whole steps of the first: at most one step (4-6 ms) lay between arrival and schedule.
    assert 0 <= second.scheduled_s - second.arrived_s < 0.02
    step_s = 0.0041
    prefill_s = (second.first_token_s - second.scheduled_s) - step_s
    assert prefill_s == pytest.approx(0.0407, abs=0.004)  # of 2000 tokens, by the profile
    assert first.finished_s - begin_s == pytest.approx(40 * step_s + prefill_s, rel=0.1)
    assert paced.engine.kv_used == 0


async def test_an_idle_engine_starts_at_the_arrival(make_profile):
    paced = pacer(make_profile())
    for _ in range(2):
        now_s = asyncio.get_running_loop().time()
        generation = paced.submit(prompt_tokens=16, output_tokens=2, arrived_s=now_s)
        await asyncio.wait([generation.done])
        assert 0.008 <= generation.finished_s - now_s < 0.2
        await asyncio.sleep(0.05)
    assert (paced.engine.running, paced.engine.waiting, paced.engine.kv_used) == (0, 0, 0)


async def test_streamed_tokens_are_counted_and_others_are_not(make_profile):
    paced = pacer(make_profile())
    streamed = paced.submit(prompt_tokens=16, output_tokens=5, arrived_s=0, streamed=True)
    plain = paced.submit(prompt_tokens=16, output_tokens=5, arrived_s=0)
    await asyncio.wait([streamed.done, plain.done])
    assert (streamed.tokens, plain.tokens) == (5, 0)
    assert streamed.streamed.is_set()


async def test_an_aborted_sequence_frees_its_place(make_profile):
    paced = pacer(make_profile(max_num_seqs=1))
    first = paced.submit(prompt_tokens=16, output_tokens=1000, arrived_s=0)
    second = paced.submit(prompt_tokens=16, output_tokens=2, arrived_s=0)
    await asyncio.sleep(0.02)
    paced.abort(first)
    await asyncio.wait_for(asyncio.wait([second.done]), 1)
    assert first.done.cancelled()
    assert first.finished_s is None
    assert paced.engine.kv_used == 0
    paced.abort(second)
    assert second.finished_s is not None


async def test_what_can_never_fit_is_refused(make_profile):
    with pytest.raises(ScepsyError, match="exceeds the KV cache"):
        pacer(make_profile()).submit(prompt_tokens=10**9, output_tokens=1, arrived_s=0)
