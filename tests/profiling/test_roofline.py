"""The analytic step times against measured kernels, and their limits in closed form."""

from dataclasses import replace

import numpy as np
import pytest

from scepsy.profiling.checkpoint import find_checkpoint
from scepsy.profiling.kernels import SYSTEMS, measured_kernels
from scepsy.profiling.memory import kv_bytes_per_token
from scepsy.profiling.roofline import DEVICES, roofline_kernels
from scepsy.profiling.shape import shape_of
from scepsy_optimizer.cluster import DEVICE_MEMORY_GIB

GRID = {
    "batch_sizes": (1, 4, 16, 64, 256),
    "context_tokens": (256, 1024, 4096),
    "prefill_tokens": (64, 512, 2048, 8192),
}
MODELS = ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-8B", "Qwen/Qwen3-32B", "meta-llama/Meta-Llama-3.1-8B", "Qwen/Qwen3-30B-A3B")


def shape(model):
    return shape_of(find_checkpoint(model).config)


def test_every_device_has_a_data_sheet_and_a_memory():
    assert SYSTEMS.keys() <= DEVICES.keys() <= DEVICE_MEMORY_GIB.keys()


@pytest.mark.parametrize("device", ["A100", "B200", "H100", "H200", "L40S"])
def test_meets_measured_kernels(device):
    errors = []
    for model in MODELS:
        found = find_checkpoint(model)
        known = measured_kernels(found, shape(model), device, tensor_parallel_sizes=(1,), **GRID)[1]
        ours = roofline_kernels(shape(model), DEVICES[device], tensor_parallel_sizes=(1,), **GRID)[1]
        errors += list(np.abs(np.log(np.array(ours.decode_s) / np.array(known.decode_s))).ravel())
        errors += list(np.abs(np.log(np.array(ours.prefill_s) / np.array(known.prefill_s))))
    assert np.median(errors) < 0.12
    assert np.quantile(errors, 0.9) < 0.30


def test_a_lone_sequence_reads_the_weights_and_a_long_prompt_computes():
    dense = shape("Qwen/Qwen3-32B")
    times = roofline_kernels(dense, DEVICES["H100"], tensor_parallel_sizes=(1,), **GRID)[1]
    reading_s = 2 * (dense.parameters - dense.vocab * dense.hidden) / 3350e9
    assert reading_s < times.decode_s[0][0] < 1.5 * reading_s
    computing_s = 2 * 8192 * (dense.parameters - 2 * dense.vocab * dense.hidden) / 989e12
    assert computing_s < times.prefill_s[-1] < 2 * computing_s


def test_contexts_cost_what_their_keys_and_values_take_to_read():
    dense = shape("Qwen/Qwen3-8B")
    rows = roofline_kernels(dense, DEVICES["L4"], tensor_parallel_sizes=(1,), **GRID)[1].decode_s
    added_s = rows[2][2] - rows[2][0]
    assert added_s == pytest.approx(16 * (4096 - 256) * kv_bytes_per_token(dense, 1) / (300e9 * 0.85))


def test_sizes_that_heads_cannot_be_split_into_are_left_out():
    found = roofline_kernels(shape("Qwen/Qwen3-8B"), DEVICES["L4"], tensor_parallel_sizes=(1, 2, 3, 5), **GRID)
    assert sorted(found) == [1, 2]


def test_links_decide_whether_devices_together_are_faster():
    dense = shape("Qwen/Qwen3-8B")
    fast = DEVICES["H100"]
    slow = replace(fast, link_gb_s=8, nvlink=False)
    for device, gain in ((fast, True), (slow, False)):
        times = roofline_kernels(dense, device, tensor_parallel_sizes=(1, 8), **GRID)
        assert (times[8].prefill_s[-1] < times[1].prefill_s[-1]) is gain


def test_eight_bits_are_faster_where_the_device_has_them():
    dense = shape("Qwen/Qwen3-8B")
    short = replace(dense, linear_bytes=1.0)

    def prefill_s(which, device):
        return roofline_kernels(which, DEVICES[device], tensor_parallel_sizes=(1,), **GRID)[1].prefill_s[-1]

    assert prefill_s(short, "L4") < 0.7 * prefill_s(dense, "L4")
    assert prefill_s(short, "A30") == pytest.approx(prefill_s(dense, "A30"), rel=0.01)
