"""The engine against schedules worked out by hand: every step takes one second, whatever is in it."""

import pytest

from scepsy_optimizer.engine import Engine
from scepsy_optimizer.prefix_cache import PrefixCache
from scepsy_optimizer.profile import GIB, LLMProfile, Provenance, StepClock, StepTimes


def one_second_steps(*, kv_tokens, **limits):
    steps = StepTimes(
        tensor_parallel_size=1,
        batch_sizes=(1,),
        context_tokens=(1,),
        decode_s=((1.0,),),
        prefill_tokens=(1,),
        prefill_s=(1.0,),
        weights_gib=1.0,
        overhead_gib=1.0,
        kv_bytes_per_token=8 * GIB / (kv_tokens + 0.5),
    )
    profile = LLMProfile(
        llm="m",
        model="m",
        device_type="H100",
        device_memory_gib=10.0,
        gpu_memory_utilization=1.0,
        steps=(steps,),
        provenance=Provenance(source="estimate", tool="made up", engine="none", date="2026-01-01"),
        **limits,
    )
    engine = Engine(profile, tensor_parallel_size=1, fraction=1.0)
    assert engine.kv_tokens == kv_tokens
    return engine


def schedule(engine, *, whole_stretches=False):
    """At which second each request got each of its tokens."""
    second, seen = 0, {}
    while True:
        stretch = engine.begin(max_steps=None if whole_stretches else 1)
        if stretch is None:
            return seen
        for step in range(stretch.steps):
            for sequence in (*stretch.decoding, *stretch.prefilled):
                seen.setdefault(sequence.id, []).append(second + step + 1)
        second += stretch.steps
        engine.complete(stretch, stretch.steps)


@pytest.mark.parametrize("whole_stretches", [False, True])
def test_a_full_cache_preempts_the_youngest_which_is_computed_again(whole_stretches):
    """Contexts 8, 8 | 9, 9 | 10, 10 = full: b goes, a ends at 6, b is prefilled again at 7 and goes on."""
    engine = one_second_steps(kv_tokens=20)
    for request in "ab":
        engine.submit(request, prompt_tokens=8, output_tokens=6)
    assert schedule(engine, whole_stretches=whole_stretches) == {
        "a": [1, 2, 3, 4, 5, 6],
        "b": [1, 2, 7, 8, 9, 10],
    }
    assert engine.preemptions == 1
    assert engine.kv_used == 0


def test_a_prompt_waits_until_all_of_it_fits():
    engine = one_second_steps(kv_tokens=20)
    engine.submit("a", prompt_tokens=10, output_tokens=3)
    engine.submit("b", prompt_tokens=10, output_tokens=2)
    # small enough, but first come is first served
    engine.submit("c", prompt_tokens=1, output_tokens=1)
    assert schedule(engine) == {"a": [1, 2, 3], "b": [4, 5], "c": [4]}


def test_no_more_than_max_num_seqs_run():
    engine = one_second_steps(kv_tokens=100, max_num_seqs=2)
    for request, tokens in (("a", 3), ("b", 1), ("c", 2)):
        engine.submit(request, prompt_tokens=1, output_tokens=tokens)
    assert schedule(engine) == {"a": [1, 2, 3], "b": [1], "c": [2, 3]}


def test_prompts_share_the_token_budget_with_decoding():
    """Eight tokens a second: 8 of a; the other 2 of a and 6 of b; one that a decodes and the other 6 of b."""
    engine = one_second_steps(kv_tokens=100, max_num_batched_tokens=8)
    engine.submit("a", prompt_tokens=10, output_tokens=3)
    engine.submit("b", prompt_tokens=12, output_tokens=1)
    assert schedule(engine) == {"a": [2, 3, 4], "b": [3]}


def prefills(engine, **request):
    """Seconds until the first token: one per chunk of ten tokens."""
    engine.submit("r", output_tokens=1, **request)
    return schedule(engine)["r"][0]


def test_a_later_call_finds_the_context_of_the_one_before():
    engine = one_second_steps(kv_tokens=200, max_num_batched_tokens=10)
    assert prefills(engine, prompt_tokens=39, prefix="x") == 4
    # 40 tokens are there now, the traces say how many of them were used
    assert prefills(engine, prompt_tokens=60, cached_tokens=40, prefix="x") == 2
    assert prefills(engine, prompt_tokens=60, cached_tokens=20, prefix="x") == 4
    # another execution finds only what is common to all
    assert prefills(engine, prompt_tokens=60, cached_tokens=40, prefix="y") == 6
    assert prefills(engine, prompt_tokens=60, cached_tokens=40, prefix="z", common_tokens=30) == 3
    # without a name the traces are believed
    assert prefills(engine, prompt_tokens=60, cached_tokens=50) == 1


def test_a_working_set_larger_than_the_cache_evicts_the_ends_of_what_was_used_longest_ago():
    engine = one_second_steps(kv_tokens=100, max_num_batched_tokens=10)
    assert prefills(engine, prompt_tokens=39, prefix="x") == 4
    assert prefills(engine, prompt_tokens=39, prefix="y") == 4
    # needs 50: 30 go, all of them from x, which keeps 10
    assert prefills(engine, prompt_tokens=49) == 5
    assert prefills(engine, prompt_tokens=40, cached_tokens=39, prefix="y") == 1
    assert prefills(engine, prompt_tokens=40, cached_tokens=39, prefix="x") == 3


def test_calls_at_once_share_their_prefix_and_pin_it():
    engine = one_second_steps(kv_tokens=100)
    engine.submit("first", prompt_tokens=50, output_tokens=1, prefix="x")
    schedule(engine)
    for request in ("a", "b", "c"):
        engine.submit(request, prompt_tokens=55, output_tokens=3, cached_tokens=50, prefix="x")
    engine.begin(max_steps=1)
    # 51 tokens of the prefix once, and 5 of each
    assert engine.kv_used == 51 + 3 * 5
    assert engine.running == 3


def test_the_cache_forgets_nothing_that_is_pinned():
    cache = PrefixCache(100)
    for name in ("x", "y"):
        cache.pin(name)
        cache.unpin(name, 40)
    cache.pin("x")
    cache.shrink(50)
    assert (cache.tokens("x"), cache.tokens("y"), cache.pinned_tokens) == (40, 10, 40)
    cache.shrink(70)
    assert (cache.tokens("x"), cache.tokens("y")) == (40, 0)


def test_attention_belongs_to_prompts_not_to_steps(make_profile):
    """Four prompts of 2048 in one step cost less than one of 8192, and later chunks of a prompt more than the first."""
    clock = StepClock(make_profile("m"), 1, 1.0)
    assert clock.attention_s > 0
    whole = clock.step_s(0, 0, 8192, 8192**2)
    assert whole == pytest.approx(clock.prefill_s(8192))
    assert clock.step_s(0, 0, 8192, 4 * 2048**2) < whole
    halves = clock.step_s(0, 0, 4096, 4096**2), clock.step_s(0, 0, 4096, 8192**2 - 4096**2)
    assert halves[0] < halves[1]
    # the weights are read twice
    assert whole < sum(halves) == pytest.approx(whole, rel=0.1)
