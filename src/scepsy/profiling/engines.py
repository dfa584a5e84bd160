"""The whole of a profile: engines of one model are started on this machine, measured one after another, and stopped."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from scepsy.profiling.arrivals import Lengths
from scepsy.profiling.endpoint import open_endpoint
from scepsy.profiling.journal import Journal
from scepsy.profiling.measuring import EngineFlags, measure
from scepsy.profiling.probing import DecodePoint, Grid, PrefillPoint, probe
from scepsy_optimizer.cluster import DEVICE_MEMORY_GIB, parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import LLMPlan, Plan, Slot
from scepsy_optimizer.profile import FractionSlowdown, LLMProfile, StepClock

if TYPE_CHECKING:
    from scepsy.deployment.specs import Engine

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineChoice:
    """How engines are started: as `scepsy.deployment.deploy` takes it. `profiles` are an emulator's timing."""

    engine: Engine = "vllm"
    command: tuple[str, ...] | None = None
    engine_args: tuple[str, ...] = ()
    profiles: Mapping[str, LLMProfile] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """vLLM's options of the same names."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 32768
    gpu_memory_utilization: float = 0.92


def profile_model(
    model: str,
    *,
    llm: str,
    device_type: str,
    tensor_parallel_sizes: Sequence[int] = (1,),
    fractions: Sequence[float] = (1.0,),
    lengths: Sequence[Lengths] = (),
    requests_per_load: int = 100,
    limits: Limits | None = None,
    choice: EngineChoice | None = None,
    folder: Path,
    on_event: Callable[[str], None] = lambda _: None,
) -> LLMProfile:
    """Start the model at each tensor parallelism, and at each fraction of one device, and measure its profile.

    `lengths` are those of traced calls, `folder` keeps what is finished: after a crash the same
    call goes on where it was. How fractions below 1 slow the engine is fitted from steps measured on them. Raises
    ScepsyError; no engine is left running.
    """
    if 1 not in tensor_parallel_sizes and any(fraction < 1 for fraction in fractions):
        raise ScepsyError("fractions are measured at tensor_parallel_size 1: add it to the sizes")
    limits, choice = limits or Limits(), choice or EngineChoice()
    profiles = []
    for size in sorted(set(tensor_parallel_sizes)):
        on_event(f"{llm} at tensor_parallel_size {size}")
        plan = _plan(model, llm, device_type, size, 1.0, limits)

        def whole(url: str, size: int = size) -> LLMProfile:
            return measure(
                url,
                llm,
                device_type=device_type,
                model=model,
                flags=EngineFlags(
                    tensor_parallel_size=size,
                    max_num_seqs=limits.max_num_seqs,
                    max_num_batched_tokens=limits.max_num_batched_tokens,
                ),
                lengths=lengths,
                requests_per_load=requests_per_load,
                journal=folder / f"tensor_parallel_size_{size}.jsonl",
                on_point=on_event,
            )

        profiles.append(_on_engine(plan, choice, whole, on_event))
    profile = joined(profiles)
    slowed = []
    for fraction in sorted({fraction for fraction in fractions if fraction < 1}, reverse=True):
        on_event(f"{llm} on {fraction:g} of a device")
        plan = _plan(model, llm, device_type, 1, fraction, limits)
        grid = _fraction_grid(profile)

        def part(url: str, fraction: float = fraction, grid: Grid = grid) -> Steps:
            file = folder / f"fraction_{fraction:g}.jsonl"
            return asyncio.run(_probe(url, llm, grid, file, fraction, on_event))

        slowed.append((fraction, _on_engine(plan, choice, part, on_event)))
    if not slowed:
        return profile
    enforcement = {"vllm": "MPS", "vllm-cpu": "CPU quota"}.get(choice.engine, "emulated")
    return replace(
        profile,
        slowdown=fit_slowdown(profile, slowed),
        provenance=replace(profile.provenance, enforcement=enforcement),
    )


Steps = tuple[list[PrefillPoint], list[DecodePoint]]


def joined(profiles: Sequence[LLMProfile]) -> LLMProfile:
    """One profile of those at single tensor parallelisms; what a step costs besides goes into each one's tables."""
    first = profiles[0]
    notes = [f"tensor_parallel_size {one.steps[0].tensor_parallel_size}: {one.provenance.note}" for one in profiles]
    tables = [
        replace(
            steps,
            decode_s=tuple(tuple(value + one.host_s for value in row) for row in steps.decode_s),
            prefill_s=tuple(value + one.host_s for value in steps.prefill_s),
        )
        for one in profiles
        for steps in one.steps
    ]
    return replace(
        first,
        steps=tuple(tables),
        host_s=0.0,
        request_s=statistics.mean(one.request_s for one in profiles),
        provenance=replace(first.provenance, note="; ".join(notes)),
    )


def fit_slowdown(whole: LLMProfile, slowed: Sequence[tuple[float, Steps]]) -> FractionSlowdown:
    """The betas of 1 + beta (1/f - 1) that steps measured on fractions of one device show; none is below 0.

    Decode steps up to `small_batch` sequences give the small beta, those from `large_batch` on the large one, which is
    at least the small one; without any of those it is the same.
    """
    clock = StepClock(whole, 1, 1.0)
    default = FractionSlowdown()
    prefill, small, large = [], [], []
    for fraction, (prefills, decodes) in slowed:
        span = 1 / fraction - 1
        prefill += [(point.step_s / clock.step_s(0, 0, point.tokens) - 1) / span for point in prefills]
        for point in decodes:
            beta = (point.step_s / clock.step_s(point.batch, point.context_tokens, 0) - 1) / span
            if point.batch <= default.small_batch:
                small.append(beta)
            elif point.batch >= default.large_batch:
                large.append(beta)
    decode_beta = max(0.0, statistics.median(small))
    return FractionSlowdown(
        prefill_beta=max(0.0, statistics.median(prefill)),
        decode_beta=decode_beta,
        decode_beta_large=max(decode_beta, statistics.median(large)) if large else decode_beta,
    )


def _fraction_grid(profile: LLMProfile) -> Grid:
    """A few steps of each kind: how much slower they are is nearly the same for all of a kind."""
    steps = profile.at(1)
    prefill = [tokens for tokens in steps.prefill_tokens if 256 <= tokens <= 4096] or [steps.prefill_tokens[-1]]
    batches = [batch for batch in (1, 8, 32, 64, 128) if batch <= profile.max_num_seqs]
    return Grid(prefill_tokens=tuple(prefill), decode=tuple((batch, 64) for batch in batches))


async def _probe(url: str, llm: str, grid: Grid, file: Path, fraction: float, on_event: Callable[[str], None]) -> Steps:
    async with open_endpoint(url, llm) as endpoint:
        facts = await endpoint.facts()
        about = {"llm": llm, "model": facts.model, "engine": facts.version, "fraction": fraction}
        return await probe(endpoint, grid, Journal(file, about), on_event)


def _on_engine(plan: Plan, choice: EngineChoice, work: Callable[[str], T], on_event: Callable[[str], None]) -> T:
    """Start the plan's only replica, do the work at its own URL, stop it."""
    from scepsy.deployment import deploy

    with deploy(
        plan,
        engine=choice.engine,
        profiles=choice.profiles,
        command=choice.command,
        engine_args=choice.engine_args,
        name=f"profile-{plan.llms[0].llm}".replace("/", "-"),
        on_event=on_event,
    ) as running:
        return work(running.status().replicas[0].url)


def _plan(model: str, llm: str, device_type: str, size: int, fraction: float, limits: Limits) -> Plan:
    if device_type not in DEVICE_MEMORY_GIB:
        raise ScepsyError(f"device type {device_type!r} is not known; known: {', '.join(sorted(DEVICE_MEMORY_GIB))}")
    part = LLMPlan(
        llm=llm,
        model=model,
        tensor_parallel_size=size,
        fraction=fraction,
        replicas=1,
        slots=(Slot(node="node0", devices=tuple(range(size))),),
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
        gpu_memory_utilization=limits.gpu_memory_utilization,
    )
    return Plan(cluster=parse_cluster(f"{size}x{device_type}"), rate_rps=0.0, llms=(part,))
