"""A profile without a GPU: step times from measured kernels or the data sheet, memory from the model's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from difflib import get_close_matches
from importlib.metadata import version
from typing import Literal

from scepsy.profiling.cache import cached_profile
from scepsy.profiling.checkpoint import Checkpoint, find_checkpoint
from scepsy.profiling.kernels import SYSTEMS, Kernels, NotMeasuredError, maps_to_known, measured_kernels, provenance_of
from scepsy.profiling.memory import kv_bytes_per_token, overhead_gib, weights_gib
from scepsy.profiling.roofline import DEVICES, roofline_kernels
from scepsy.profiling.shape import ModelShape, shape_of
from scepsy_optimizer.cluster import DEVICE_MEMORY_GIB
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import GIB, LLMProfile, Provenance, StepTimes

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXT_TOKENS = (256, 1024, 4096, 16384, 32768)
PREFILL_TOKENS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Grids of every estimate; for models of longer contexts they go on by doubling, so that nothing is extrapolated."""

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


Method = Literal["kernels", "roofline"]

METHODS: Mapping[Method, Mapping[str, object]] = {"kernels": SYSTEMS, "roofline": DEVICES}
"""The device types of each method."""

NOTES: Mapping[Method, str] = {
    "kernels": "",
    "roofline": "from data sheets: within about 10 % where kernels were measured, nobody has measured them here",
}


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
    method: Method | None = None,
    host_s: float = HOST_S,
    request_s: float = REQUEST_S,
    date: str | None = None,
) -> LLMProfile:
    """The profile of a model on a device type, without running it.

    `model` is a directory with a config.json or a Hugging Face id, `llm` the served name (default: the model's),
    `quantization` what vLLM is told to quantise to beyond the checkpoint ("fp8"). `method` is "kernels" (measured
    ones, from aiconfigurator-core) or "roofline" (the device's data sheet); by default kernels where the device and
    the model have been measured. Tensor-parallel sizes that the model's heads cannot be split into are left out;
    `max_model_len` is cut to what the model was made for. `date` goes into the provenance (default: today). Answers
    are kept on disk. Raises ScepsyError for an unknown model or device type, and where kernels are asked for and
    aiconfigurator-core is not installed or, with `method`, does not know them.
    """
    device = known_device(device_type)
    wanted: Method = method or ("kernels" if device in SYSTEMS else "roofline")
    if device not in METHODS[wanted]:
        raise ScepsyError(
            f"no {wanted} of {device}: it has {' and '.join(name for name in METHODS if device in METHODS[name])}"
        )
    sources = {"roofline": (f"scepsy {version('scepsy')} roofline", "vllm")}
    if wanted == "kernels":
        sources["kernels"] = provenance_of(device)
    checkpoint = find_checkpoint(model)
    shape = shape_of(checkpoint.config, quantization=quantization)
    if wanted == "kernels" and not maps_to_known(shape):
        wanted = "roofline"
    longest = min(max_model_len, shape.max_position)

    def make() -> LLMProfile:
        grids = _Grids(
            batch_sizes=tuple(size for size in BATCH_SIZES if size <= max(max_num_seqs, BATCH_SIZES[0])),
            context_tokens=_reaching(CONTEXT_TOKENS, longest),
            prefill_tokens=_reaching(PREFILL_TOKENS, longest),
        )
        found_by = wanted
        try:
            times = _kernels(wanted, checkpoint, shape, device, tensor_parallel_sizes, grids, quantization)
        except NotMeasuredError:
            if method is not None:
                raise
            found_by = "roofline"
            times = _kernels(found_by, checkpoint, shape, device, tensor_parallel_sizes, grids, quantization)
        tool, engine = sources[found_by]
        limits = max_num_seqs, max_num_batched_tokens, max(0.0, HOST_FLOOR_S - host_s)
        return LLMProfile(
            llm=llm or model,
            model=model,
            device_type=device,
            device_memory_gib=DEVICE_MEMORY_GIB[device],
            steps=tuple(
                _step_times(size, found, grids, checkpoint, shape, *limits) for size, found in sorted(times.items())
            ),
            provenance=Provenance(
                source="estimate",
                tool=tool,
                engine=engine,
                date=date or datetime.now(UTC).date().isoformat(),
                note=NOTES[found_by],
            ),
            host_s=host_s,
            request_s=request_s,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=longest,
        )

    question = {
        "scepsy": version("scepsy"),
        "sources": sources,
        "method": [method, wanted],
        "model": model,
        "config": dict(checkpoint.config),
        "weights_bytes": checkpoint.weights_bytes,
        "device": device,
        "tensor_parallel_sizes": list(tensor_parallel_sizes),
        "limits": [max_model_len, max_num_seqs, max_num_batched_tokens],
        "quantization": quantization,
        "host_s": [host_s, HOST_FLOOR_S, request_s],
        "date": date,
    }
    return cached_profile(question, llm or model, make)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grids:
    """Where step times are taken."""

    batch_sizes: tuple[int, ...]
    context_tokens: tuple[int, ...]
    prefill_tokens: tuple[int, ...]


def _reaching(grid: tuple[int, ...], longest: int) -> tuple[int, ...]:
    """The grid, doubled on until it reaches so far."""
    while grid[-1] < longest:
        grid = (*grid, 2 * grid[-1])
    return grid


def _kernels(
    method: Method,
    checkpoint: Checkpoint,
    shape: ModelShape,
    device: str,
    sizes: Sequence[int],
    grids: _Grids,
    quantization: str | None,
) -> dict[int, Kernels]:
    if method == "roofline":
        found = roofline_kernels(
            shape,
            DEVICES[device],
            tensor_parallel_sizes=sizes,
            batch_sizes=grids.batch_sizes,
            context_tokens=grids.context_tokens,
            prefill_tokens=grids.prefill_tokens,
        )
        if not found:
            raise ScepsyError(
                f"{checkpoint.model!r}: its {shape.heads} heads cannot be split into any of {list(sizes)}"
            )
        return found
    return measured_kernels(
        checkpoint,
        shape,
        device,
        tensor_parallel_sizes=sizes,
        batch_sizes=grids.batch_sizes,
        context_tokens=grids.context_tokens,
        prefill_tokens=grids.prefill_tokens,
        quantization=quantization,
    )


def known_device(device_type: str) -> str:
    """The device type in the spelling of the tables. Raises ScepsyError that lists the known ones."""
    device = device_type.upper()
    known = sorted((SYSTEMS.keys() | DEVICES.keys()) & DEVICE_MEMORY_GIB.keys())
    if device in known:
        return device
    close = get_close_matches(device, known, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    raise ScepsyError(
        f"device type {device_type!r} cannot be estimated; known: {', '.join(known)}.{hint} "
        "Measure a profile on the device instead"
    )


def _step_times(
    size: int,
    kernels: Kernels,
    grids: _Grids,
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
        batch_sizes=grids.batch_sizes,
        context_tokens=grids.context_tokens,
        decode_s=tuple(tuple(rounded(max(value, floor_s)) for value in row) for row in kernels.decode_s),
        prefill_tokens=grids.prefill_tokens,
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
