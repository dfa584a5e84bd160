"""A profile, its tables and its slowdown refuse numbers that mean nothing, and say which."""

from dataclasses import replace
from math import inf, nan

import pytest

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import FractionSlowdown


@pytest.fixture(scope="module")
def profile(make_profile):
    return make_profile("a")


@pytest.mark.parametrize(
    ("name", "wrong", "told"),
    [
        *(("device_memory_gib", value, "must be positive and finite") for value in (0, -1.0, nan, inf)),
        *(("gpu_memory_utilization", value, "must be above 0 and at most 1") for value in (0, -1.0, 3.0, nan)),
        *(
            (name, value, "must be finite and at least 0")
            for name in ("host_s", "request_s")
            for value in (-5, nan, inf)
        ),
        *((name, 0, "must be at least 1") for name in ("max_num_seqs", "max_num_batched_tokens")),
        ("max_model_len", -1, "must be at least 0"),
    ],
)
def test_a_profile_refuses_numbers_that_mean_nothing(profile, name, wrong, told):
    with pytest.raises(ScepsyError) as caught:
        replace(profile, **{name: wrong})
    assert str(caught.value) == f"profile of 'a' on H100: {name} {told}, got {wrong}"


def test_a_profile_has_one_table_of_each_size(profile):
    with pytest.raises(ScepsyError, match=r"profile of 'a' on H100: steps is empty; give the step times"):
        replace(profile, steps=())
    with pytest.raises(ScepsyError, match=r"steps has tensor_parallel_size 2 twice; leave one of them out"):
        replace(profile, steps=(*profile.steps, profile.at(2)))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tensor_parallel_size": 0}, "tensor_parallel_size 0: give the number of devices"),
        ({"tensor_parallel_size": -2}, "tensor_parallel_size -2: give the number of devices"),
        ({"prefill_s": (nan, nan, nan)}, "prefill_s has nan; every time must be a finite number"),
        ({"prefill_s": (0.1, 0.2, inf)}, "prefill_s has inf; every time must be a finite number"),
        ({"decode_s": ((0.1, 0.2, 0.3), (0.2, nan, 0.4), (0.3, 0.4, 0.5))}, "decode_s has nan"),
        ({"weights_gib": nan}, "weights_gib must be positive and finite, got nan"),
        ({"kv_bytes_per_token": inf}, "kv_bytes_per_token must be positive and finite, got inf"),
        ({"overhead_gib": nan}, "overhead_gib must be finite and at least 0, got nan"),
        ({"overhead_gib": -1000.0}, "overhead_gib must be finite and at least 0, got -1000"),
    ],
)
def test_step_times_refuse_numbers_that_mean_nothing(profile, changes, told):
    with pytest.raises(ScepsyError) as caught:
        replace(profile.at(1), **changes)
    assert told in str(caught.value)
    assert str(caught.value).startswith("step times at tensor_parallel_size")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prefill_beta": nan}, "slowdown: prefill_beta must be a finite number, got nan"),
        ({"decode_beta_large": inf}, "slowdown: decode_beta_large must be a finite number, got inf"),
        ({"decode_beta": -1.0}, "decode_beta must be at least 0, got -1"),
        ({"down_to": 5.0}, "slowdown: down_to must be a fraction from 0 to 1, got 5"),
        ({"down_to": nan}, "slowdown: down_to must be a fraction from 0 to 1, got nan"),
    ],
)
def test_a_slowdown_refuses_numbers_that_mean_nothing(changes, told):
    with pytest.raises(ScepsyError) as caught:
        FractionSlowdown(**changes)
    assert told in str(caught.value)


def test_what_costs_nothing_is_allowed(profile):
    free = replace(profile, host_s=0.0, request_s=0, max_model_len=0, gpu_memory_utilization=1)
    assert replace(free, steps=(replace(profile.at(1), overhead_gib=0),)).kv_tokens(1, 1.0) > 0
