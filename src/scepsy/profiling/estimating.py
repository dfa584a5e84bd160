"""A profile without a GPU: step times from measured kernels, memory from the model's shape."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from difflib import get_close_matches

from scepsy.profiling.checkpoint import Checkpoint, find_checkpoint
from scepsy.profiling.kernels import SYSTEMS, Kernels, measured_kernels, provenance_of
from scepsy.profiling.memory import kv_bytes_per_token, overhead_gib, weights_gib
from scepsy.profiling.shape import ModelShape, shape_of
from scepsy_optimizer.cluster import DEVICE_MEMORY_GIB
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import GIB, LLMProfile, Provenance, StepTimes

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXT_TOKENS = (256, 1024, 4096, 16384, 32768)
PREFILL_TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)

HOST_S = 0.0003
"""What the engine's own work adds to every step where it is overlapped with the device's (vLLM 0.14 and newer).

Kernel tables do not contain it. The values here are those at which the published serving points of vLLM 0.15 to 0.19
on H100, H200 and B200 are met without bias (benchmarks/profile_accuracy.py); vLLM 0.12, which does this work between
the steps, needs 2.2 ms.
"""

HOST_FLOOR_S = 0.002
"""No step is shorter than the work of the scheduler for the next one, which is the same where it is overlapped."""

REQUEST_S = 0.02
"""Time to the first token beyond queue and prefill: HTTP, tokenising, and the way back. From the same points."""


def estimate(
    model: str,
    device_type: str,
    *,
    llm: str | None = None,
    tensor_parallel_sizes: Sequence[int] = (1, 2, 4, 8),
    max_model_len: int = 32768,
    max_num_seqs: int = 256,
    max_num_batched_tokens: int = 8192,
    quantization: str | None = None,
    host_s: float = HOST_S,
    request_s: float = REQUEST_S,
    date: str | None = None,
) -> LLMProfile:
    """The profile of a model on a device type, without running it.

    `model` is a directory with a config.json or a Hugging Face id, `llm` the served name (default: the model's),
    `quantization` what vLLM is told to quantise to beyond the checkpoint ("fp8"). Tensor-parallel sizes that the
    model's heads cannot be split into are left out; `max_model_len` is cut to what the model was made for. `date` goes
    into the provenance (default: today). Raises ScepsyError for an unknown model or device type, and where
    aiconfigurator-core is not installed.
    """
    device = known_device(device_type)
    tool, engine = provenance_of(device)
    checkpoint = find_checkpoint(model)
    shape = shape_of(checkpoint.config, quantization=quantization)
    kernels = measured_kernels(
        checkpoint,
        shape,
        device,
        tensor_parallel_sizes=tensor_parallel_sizes,
        batch_sizes=[size for size in BATCH_SIZES if size <= max(max_num_seqs, BATCH_SIZES[0])],
        context_tokens=CONTEXT_TOKENS,
        prefill_tokens=PREFILL_TOKENS,
        quantization=quantization,
    )
    limits = max_num_seqs, max_num_batched_tokens, max(0.0, HOST_FLOOR_S - host_s)
    return LLMProfile(
        llm=llm or model,
        model=model,
        device_type=device,
        device_memory_gib=DEVICE_MEMORY_GIB[device],
        steps=tuple(_step_times(size, found, checkpoint, shape, *limits) for size, found in sorted(kernels.items())),
        provenance=Provenance(
            source="estimate",
            tool=tool,
            engine=engine,
            date=date or datetime.now(UTC).date().isoformat(),
        ),
        host_s=host_s,
        request_s=request_s,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=min(max_model_len, shape.max_position),
    )


def known_device(device_type: str) -> str:
    """The device type in the spelling of the tables. Raises ScepsyError that lists the known ones."""
    device = device_type.upper()
    if device in SYSTEMS and device in DEVICE_MEMORY_GIB:
        return device
    known = sorted(SYSTEMS.keys() & DEVICE_MEMORY_GIB.keys())
    close = get_close_matches(device, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise ScepsyError(
        f"device type {device_type!r} cannot be estimated; known: {', '.join(known)}.{hint} "
        "Measure a profile on the device instead"
    )


def _step_times(
    size: int,
    kernels: Kernels,
    checkpoint: Checkpoint,
    shape: ModelShape,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    floor_s: float,
) -> StepTimes:
    weights = weights_gib(shape, size)
    if checkpoint.weights_bytes is not None:
        # What lies on disk is what is loaded: it knows of quantisation and padding that the configuration does not.
        weights *= checkpoint.weights_bytes / GIB / weights_gib(shape, 1)
    return StepTimes(
        tensor_parallel_size=size,
        batch_sizes=BATCH_SIZES[: len(kernels.decode_s)],
        context_tokens=CONTEXT_TOKENS,
        decode_s=tuple(tuple(rounded(max(value, floor_s)) for value in row) for row in kernels.decode_s),
        prefill_tokens=PREFILL_TOKENS,
        prefill_s=tuple(rounded(max(value, floor_s)) for value in kernels.prefill_s),
        weights_gib=round(weights, 2),
        overhead_gib=round(
            overhead_gib(shape, size, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens), 2
        ),
        kv_bytes_per_token=kv_bytes_per_token(shape, size),
    )


def rounded(seconds: float) -> float:
    """To four digits: the tables are not better than that, and a person reads them. Rounding keeps the order."""
    return float(f"{seconds:.4g}")
