"""A profile by measurement: a running engine is asked, and its answers are timed."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from scepsy.profiling.checkpoint import find_checkpoint
from scepsy.profiling.endpoint import EngineFacts, open_endpoint
from scepsy.profiling.fitting import fit_steps
from scepsy.profiling.journal import Journal
from scepsy.profiling.memory import kv_bytes_per_token, overhead_gib, weights_gib
from scepsy.profiling.probing import DecodePoint, PrefillPoint, probe, probe_grid
from scepsy.profiling.shape import shape_of
from scepsy_optimizer.cluster import DEVICE_MEMORY_GIB
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import PROPORTIONAL, FractionSlowdown, LLMProfile, Provenance, StepTimes


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFlags:
    """How an engine was started, which it does not tell by itself: vLLM's options of the same names."""

    tensor_parallel_size: int = 1
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192


def measure(
    endpoint: str,
    llm: str,
    *,
    device_type: str,
    model: str | None = None,
    flags: EngineFlags | None = None,
    journal: Path | None = None,
    on_point: Callable[[str], None] = lambda _: None,
    date: str | None = None,
) -> LLMProfile:
    """Measure the profile of one LLM behind a running endpoint, which must be one engine that nobody else uses.

    `endpoint` is its base URL, `llm` the served name, `model` what the engine loads (default: what it says), `flags`
    how it was started, on whole devices. Points that are finished are kept in the file `journal` and not measured
    again. `on_point` is told of each. Raises ScepsyError.
    """
    if device_type not in DEVICE_MEMORY_GIB:
        raise ScepsyError(f"device type {device_type!r} is not known; known: {', '.join(sorted(DEVICE_MEMORY_GIB))}")
    flags = flags or EngineFlags()
    facts, prefill, decode = asyncio.run(_probe(endpoint, llm, flags, journal, on_point))
    return LLMProfile(
        llm=llm,
        model=model or facts.model,
        device_type=device_type,
        device_memory_gib=DEVICE_MEMORY_GIB[device_type],
        steps=(_steps(facts, model or facts.model, flags, prefill, decode),),
        provenance=Provenance(
            source="measured",
            tool=f"scepsy {version('scepsy')}",
            engine=f"vllm {facts.version}",
            date=date or datetime.now(UTC).date().isoformat(),
            note=f"{len(prefill)} prefill and {len(decode)} decode points",
        ),
        # A quota of a core slows everything in proportion; a share of a GPU does not, and is not measured here.
        slowdown=PROPORTIONAL if device_type == "CPU" else FractionSlowdown(),
        # The engine's own time is inside every measured step.
        host_s=0.0,
        request_s=round(statistics.median(point.request_s for point in prefill), 5),
        max_num_seqs=flags.max_num_seqs,
        max_num_batched_tokens=flags.max_num_batched_tokens,
        max_model_len=facts.max_model_len,
    )


async def _probe(
    url: str, llm: str, flags: EngineFlags, journal: Path | None, on_point: Callable[[str], None]
) -> tuple[EngineFacts, list[PrefillPoint], list[DecodePoint]]:
    async with open_endpoint(url, llm) as endpoint:
        facts = await endpoint.facts()
        subject = {"llm": llm, "model": facts.model, "engine": facts.version, **asdict(flags)}
        grid = probe_grid(max_model_len=facts.max_model_len, max_num_seqs=flags.max_num_seqs, kv_tokens=facts.kv_tokens)
        prefill, decode = await probe(endpoint, grid, Journal(journal, subject), on_point)
    return facts, prefill, decode


def _steps(
    facts: EngineFacts, model: str, flags: EngineFlags, prefill: list[PrefillPoint], decode: list[DecodePoint]
) -> StepTimes:
    """Tables, and memory: the KV cache per token as the engine counts it, else as the model's shape says."""
    shape = shape_of(find_checkpoint(model).config)
    size = flags.tensor_parallel_size
    return fit_steps(
        prefill,
        decode,
        tensor_parallel_size=size,
        weights_gib=weights_gib(shape, size),
        overhead_gib=overhead_gib(
            shape,
            size,
            max_num_seqs=flags.max_num_seqs,
            max_num_batched_tokens=flags.max_num_batched_tokens,
        ),
        kv_bytes_per_token=facts.kv_bytes_per_token or kv_bytes_per_token(shape, size),
    )
