"""Step times where nobody has measured the kernels: what the device could do at best, times what engines reach of it.

A matrix product takes the longer of its arithmetic and of reading its weights, softened where the two meet; attention
of a decode step reads the keys and values, attention of a prefill computes their product; every layer costs a fixed
time besides; tensor parallelism adds two all-reduces per layer. Five constants were fitted once to the measured kernels
of six models on five GPUs (A100, B200, H100, H200, L40S), all of which they meet with a median error of 8 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scepsy.profiling.kernels import Kernels
from scepsy.profiling.memory import kv_bytes_per_token
from scepsy.profiling.shape import ModelShape
from scepsy_optimizer.cluster import DEVICE_MEMORY_GB_S

_OF_PEAK = 0.64
_OF_BANDWIDTH = 0.81
_OF_BANDWIDTH_ATTENTION = 0.85
_OF_PEAK_ATTENTION = 0.46
_LAYER_S = 42e-6
# Kernels of a prefill are launched one by one, those of a decode step by a graph.
_LAUNCHED_ONE_BY_ONE = 1.5
# How sharply arithmetic and reading overlap: 1 adds them, infinity takes the longer one.
_SHARPNESS = 4
_ALL_REDUCE_S = 12e-6
# Measured on L40S: the bandwidth of an all-reduce without NVLink falls faster than the number of devices grows.
_CROWDING = 1.6


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """A device by its data sheet: dense 16-bit teraflops, memory and link bandwidth in GB/s (one direction).

    `fp8` is whether it computes in 8 bits at twice the speed, `nvlink` whether the link is one.
    """

    teraflops: float
    memory_gb_s: float
    link_gb_s: float
    fp8: bool = False
    nvlink: bool = False


DEVICES: Mapping[str, DeviceSpec] = {
    "A100": DeviceSpec(teraflops=312, memory_gb_s=DEVICE_MEMORY_GB_S["A100"], link_gb_s=300, nvlink=True),
    "A100_PCIE": DeviceSpec(teraflops=312, memory_gb_s=DEVICE_MEMORY_GB_S["A100_PCIE"], link_gb_s=16),
    "A10G": DeviceSpec(teraflops=70, memory_gb_s=DEVICE_MEMORY_GB_S["A10G"], link_gb_s=16),
    "A30": DeviceSpec(teraflops=165, memory_gb_s=DEVICE_MEMORY_GB_S["A30"], link_gb_s=16),
    "B200": DeviceSpec(teraflops=2250, memory_gb_s=DEVICE_MEMORY_GB_S["B200"], link_gb_s=900, fp8=True, nvlink=True),
    "B300": DeviceSpec(teraflops=2250, memory_gb_s=DEVICE_MEMORY_GB_S["B300"], link_gb_s=900, fp8=True, nvlink=True),
    "GB200": DeviceSpec(teraflops=2500, memory_gb_s=DEVICE_MEMORY_GB_S["GB200"], link_gb_s=900, fp8=True, nvlink=True),
    "H100": DeviceSpec(teraflops=989, memory_gb_s=DEVICE_MEMORY_GB_S["H100"], link_gb_s=450, fp8=True, nvlink=True),
    "H100_PCIE": DeviceSpec(teraflops=756, memory_gb_s=DEVICE_MEMORY_GB_S["H100_PCIE"], link_gb_s=32, fp8=True),
    "H200": DeviceSpec(teraflops=989, memory_gb_s=DEVICE_MEMORY_GB_S["H200"], link_gb_s=450, fp8=True, nvlink=True),
    "L4": DeviceSpec(teraflops=121, memory_gb_s=DEVICE_MEMORY_GB_S["L4"], link_gb_s=16, fp8=True),
    "L40S": DeviceSpec(teraflops=362, memory_gb_s=DEVICE_MEMORY_GB_S["L40S"], link_gb_s=16, fp8=True),
    "RTX_4090": DeviceSpec(teraflops=165, memory_gb_s=DEVICE_MEMORY_GB_S["RTX_4090"], link_gb_s=16, fp8=True),
    "RTX_5090": DeviceSpec(teraflops=209, memory_gb_s=DEVICE_MEMORY_GB_S["RTX_5090"], link_gb_s=32, fp8=True),
    "RTX_PRO_6000": DeviceSpec(teraflops=468, memory_gb_s=DEVICE_MEMORY_GB_S["RTX_PRO_6000"], link_gb_s=32, fp8=True),
}
"""Devices whose data sheet is known. Their memory and its bandwidth are in `scepsy_optimizer.cluster`."""


def roofline_kernels(
    shape: ModelShape,
    device: DeviceSpec,
    *,
    tensor_parallel_sizes: Sequence[int],
    batch_sizes: Sequence[int],
    context_tokens: Sequence[int],
    prefill_tokens: Sequence[int],
) -> dict[int, Kernels]:
    """Forward times by tensor parallelism; sizes that the heads cannot be split into are left out."""
    sizes = [size for size in tensor_parallel_sizes if shape.heads % size == 0]
    found = {}
    for size in sizes:
        clock = _Roofline(shape, device, size)
        found[size] = Kernels(
            decode_s=tuple(tuple(clock.decode_s(batch, tokens) for tokens in context_tokens) for batch in batch_sizes),
            prefill_s=tuple(clock.prefill_s(tokens) for tokens in prefill_tokens),
        )
    return found


@dataclass(frozen=True, slots=True)
class _Roofline:
    shape: ModelShape
    device: DeviceSpec
    size: int

    def decode_s(self, batch: int, context: int) -> float:
        keys = batch * context * kv_bytes_per_token(self.shape, self.size)
        attention_s = keys / (self.device.memory_gb_s * 1e9 * _OF_BANDWIDTH_ATTENTION) if self.shape.causal else 0.0
        return self._matrices_s(batch, batch) + attention_s + self.shape.layers * _LAYER_S + self._together_s(batch)

    def prefill_s(self, tokens: int) -> float:
        shape = self.shape
        # A causal mask halves the product of queries and keys; the one with the values is of the same size.
        products = (2 if shape.causal else 4) * tokens * tokens * shape.heads * shape.head_dim * shape.layers
        attention_s = products / self.size / (self.device.teraflops * 1e12 * _OF_PEAK_ATTENTION)
        fixed_s = shape.layers * _LAYER_S * _LAUNCHED_ONE_BY_ONE
        return self._matrices_s(tokens, 1) + attention_s + fixed_s + self._together_s(tokens)

    def _matrices_s(self, tokens: int, sampled: int) -> float:
        """All matrix products of so many tokens, of which so many have their next token computed."""
        shape = self.shape
        dense = shape.layers * shape.attention_parameters
        dense += (shape.layers - shape.expert_layers) * shape.mlp_parameters
        active, read = float(dense), dense * shape.linear_bytes
        if shape.experts:
            experts = shape.expert_layers * shape.expert_parameters
            active += experts * shape.experts_per_token
            untouched = (1 - shape.experts_per_token / shape.experts) ** tokens
            read += experts * shape.experts * (1 - untouched) * shape.expert_bytes
        head = shape.vocab * shape.hidden if shape.causal else 0
        width = shape.expert_bytes if shape.experts else shape.linear_bytes
        return self._product_s(tokens * active, read, width) + self._product_s(sampled * head, head * 2.0, 2.0)

    def _product_s(self, multiplications: float, read_bytes: float, parameter_bytes: float) -> float:
        speed = 2.0 if self.device.fp8 and parameter_bytes == 1.0 else 1.0
        arithmetic_s = 2 * multiplications / self.size / (self.device.teraflops * speed * 1e12 * _OF_PEAK)
        reading_s = read_bytes / self.size / (self.device.memory_gb_s * 1e9 * _OF_BANDWIDTH)
        return float((arithmetic_s**_SHARPNESS + reading_s**_SHARPNESS) ** (1 / _SHARPNESS))

    def _together_s(self, tokens: int) -> float:
        """The two all-reduces of each layer."""
        if self.size == 1:
            return 0.0
        crowding = 1.0 if self.device.nvlink else (2 / self.size) ** _CROWDING
        sent = 2 * (self.size - 1) / self.size * tokens * self.shape.hidden * 2
        return 2 * self.shape.layers * (_ALL_REDUCE_S + sent / (self.device.link_gb_s * 1e9 * crowding))
