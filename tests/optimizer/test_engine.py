import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scepsy_optimizer.engine import Engine
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import StepClock


def drain(engine):
    now, done, counts = 0.0, {}, {}
    while (step := engine.step()) is not None:
        now += step.duration_s
        for request in step.tokens:
            counts[request] = counts.get(request, 0) + 1
        for request in step.finished:
            done[request] = now
    return done, counts


def test_one_request_alone(make_profile):
    profile = make_profile("m")
    engine = Engine(profile, tensor_parallel_size=1, fraction=1.0)
    engine.submit("r", prompt_tokens=100, output_tokens=3)
    clock = StepClock(profile, 1, 1.0)
    done, counts = drain(engine)
    assert counts == {"r": 3}
    assert done["r"] == pytest.approx(clock.prefill_s(100) + clock.decode_s(1, 101) + clock.decode_s(1, 102))


def test_a_long_prompt_is_computed_in_chunks(make_profile):
    profile = make_profile("m", max_num_batched_tokens=512)
    engine = Engine(profile, tensor_parallel_size=1, fraction=1.0)
    engine.submit("long", prompt_tokens=1200, output_tokens=1)
    steps = []
    while (step := engine.step()) is not None:
        steps.append(step.tokens)
    assert steps == [(), (), ("long",)]


def test_a_cached_prompt_costs_only_its_rest(make_profile):
    profile = make_profile("m")
    times = []
    for cached in (0, 3000, 4000):
        engine = Engine(profile, tensor_parallel_size=1, fraction=1.0)
        engine.submit("r", prompt_tokens=4000, output_tokens=1, cached_tokens=cached)
        times.append(drain(engine)[0]["r"])
    assert times[0] > times[1] > times[2] > 0


def test_max_num_seqs_makes_requests_wait(make_profile):
    engine = Engine(make_profile("m", max_num_seqs=2), tensor_parallel_size=1, fraction=1.0)
    for request in range(3):
        engine.submit(request, prompt_tokens=10, output_tokens=5)
    engine.step()
    assert (engine.running, engine.waiting) == (2, 1)
    engine.abort(0)
    engine.step()
    assert (engine.running, engine.waiting) == (2, 0)
    done, _ = drain(engine)
    assert set(done) == {1, 2}
    assert engine.kv_used == 0


def test_impossible_requests_and_replicas_are_refused(make_profile):
    engine = Engine(make_profile("m"), tensor_parallel_size=1, fraction=1.0)
    with pytest.raises(ScepsyError, match="exceeds the KV cache"):
        engine.submit("r", prompt_tokens=10**9, output_tokens=1)
    with pytest.raises(ScepsyError, match="does not fit into 0.1"):
        Engine(make_profile("m"), tensor_parallel_size=1, fraction=0.1)


@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 60), st.integers(0, 3500)), min_size=1, max_size=30),
    st.integers(1, 8),
    st.integers(16, 4096),
)
def test_every_request_gets_its_tokens_and_the_cache_ends_empty(make_profile, requests, seqs, budget):
    profile = make_profile("m", max_num_seqs=seqs, max_num_batched_tokens=budget)
    engine = Engine(profile, tensor_parallel_size=1, fraction=1.0)
    for index, (prompt, output, cached) in enumerate(requests):
        engine.submit(index, prompt_tokens=prompt, output_tokens=output, cached_tokens=cached)
    done, counts = drain(engine)
    assert counts == {index: output for index, (_, output, _) in enumerate(requests)}
    assert len(done) == len(requests)
    assert engine.kv_used == 0


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 200)), min_size=1, max_size=20),
    st.integers(1, 8),
)
def test_stretches_take_the_time_of_their_steps(make_profile, requests, seqs):
    """Many steps at once finish the same requests at the same times, but for how contexts grow within a stretch."""
    profile = make_profile("m", max_num_seqs=seqs)
    engines = [Engine(profile, tensor_parallel_size=1, fraction=1.0) for _ in range(2)]
    for engine in engines:
        for index, (prompt, output) in enumerate(requests):
            engine.submit(index, prompt_tokens=prompt, output_tokens=output)
    single, _ = drain(engines[0])
    now, done = 0.0, {}
    while (stretch := engines[1].begin()) is not None:
        now += stretch.steps * stretch.step_s
        done |= dict.fromkeys(engines[1].complete(stretch, stretch.steps), now)
    assert done.keys() == single.keys()
    assert all(done[request] == pytest.approx(single[request], rel=1e-3) for request in done)


def test_a_server_on_the_engines_core_takes_its_time(make_profile):
    def both_s(**changes):
        engine = Engine(make_profile("m", **changes), tensor_parallel_size=1, fraction=1.0)
        engine.submit("a", prompt_tokens=100, output_tokens=2)
        engine.submit("b", prompt_tokens=100, output_tokens=2)
        return drain(engine)[0]["b"]

    alone_s = both_s()
    assert both_s(request_s=0.05) == pytest.approx(alone_s)
    assert both_s(request_s=0.05, request_occupies=True) == pytest.approx(alone_s + 0.1)
