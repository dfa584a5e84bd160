"""The whole of a profile: engines of one model are started on this machine, measured one after another, and stopped."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from scepsy.deployment import machine
from scepsy.profiling.checkpoint import find_checkpoint
from scepsy.profiling.endpoint import open_endpoint
from scepsy.profiling.journal import Journal
from scepsy.profiling.measuring import EngineFlags, Subject, check_device, load_plan, measure_engine, today
from scepsy.profiling.probing import DecodePoint, Grid, PrefillPoint, probe, probe_grid
from scepsy.profiling.progress import Progress, Work
from scepsy.profiling.sent import Lengths
from scepsy.profiling.shape import shape_of
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import LLMPlan, Plan, Slot
from scepsy_optimizer.profile import FractionSlowdown, LLMProfile, StepClock

if TYPE_CHECKING:
    from scepsy.deployment.specs import Engine

T = TypeVar("T")

# Only for the time that is left, until the first one has started.
_GUESSED_START_S = 60.0


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
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> LLMProfile:
    """Start the model at each tensor parallelism, and at each fraction of one device, and measure its profile.

    `lengths` are those of traced calls, `folder` keeps what is finished: after a crash the same
    call goes on where it was. A `max_model_len` beyond what the model was made for is cut to that. How fractions below
    1 slow the engine is fitted from steps measured on them. Raises ScepsyError; no engine is left running.
    """
    if 1 not in tensor_parallel_sizes and any(fraction < 1 for fraction in fractions):
        raise ScepsyError("fractions are measured at tensor_parallel_size 1: add it to the sizes")
    check_device(device_type)
    limits, choice = limits or Limits(), choice or EngineChoice()
    longest = shape_of(find_checkpoint(model).config).max_position
    limits = replace(limits, max_model_len=min(limits.max_model_len, longest))
    sizes = {size: f"tensor_parallel_size {size}" for size in sorted(set(tensor_parallel_sizes))}
    parts = {part: f"fraction {part:g}" for part in sorted({part for part in fractions if part < 1}, reverse=True)}
    session = _Session(
        model=model, llm=llm, device_type=device_type, limits=limits, choice=choice, on_progress=on_progress
    )
    grid = probe_grid(max_model_len=limits.max_model_len, max_num_seqs=limits.max_num_seqs, kv_tokens=None)
    loads = load_plan(lengths, limits.max_model_len, requests_per_load)
    for engine in sizes.values():
        session.expect(engine, grid.guesses_s(engine) | loads.guesses_s(engine))
    for engine in parts.values():
        session.expect(engine, fraction_grid(grid.prefill_tokens, limits.max_num_seqs).guesses_s(engine))
    subject = Subject(
        llm=llm,
        device_type=device_type,
        flags=EngineFlags(
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            others=(f"--gpu-memory-utilization {limits.gpu_memory_utilization:g}", *choice.engine_args),
        ),
        model=model,
        date=today(),
        hardware=hardware(choice.engine),
    )
    profiles = []
    for size, engine in sizes.items():

        def whole(url: str, size: int = size, engine: str = engine) -> LLMProfile:
            flags = replace(subject.flags, tensor_parallel_size=size)
            file = folder / f"tensor_parallel_size_{size}.jsonl"
            measured = measure_engine(
                url, replace(subject, flags=flags), lengths, requests_per_load, file, session.work, engine
            )
            return asyncio.run(measured)

        profiles.append(session.on_engine(engine, size, 1.0, whole))
    profile = joined(profiles)
    slowed = []
    for fraction, engine in parts.items():

        def part(url: str, fraction: float = fraction, engine: str = engine) -> Steps:
            file = folder / f"fraction_{fraction:g}.jsonl"
            grid = fraction_grid(profile.at(1).prefill_tokens, profile.max_num_seqs)
            return asyncio.run(_probe(url, llm, grid, file, fraction, session.work, engine))

        slowed.append((fraction, session.on_engine(engine, 1, fraction, part)))
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
        down_to=min(fraction for fraction, _ in slowed),
    )


def fraction_grid(prefill_tokens: Sequence[int], max_num_seqs: int) -> Grid:
    """A few steps of each kind: how much slower they are is nearly the same for all of a kind."""
    prefill = [tokens for tokens in prefill_tokens if 256 <= tokens <= 4096] or [prefill_tokens[-1]]
    batches = [batch for batch in (1, 8, 32, 64, 128) if batch <= max_num_seqs]
    return Grid(prefill_tokens=tuple(prefill), decode=tuple((batch, 64) for batch in batches))


def hardware(engine: Engine) -> str:
    """What the devices of this machine call themselves. Raises ScepsyError where GPUs are wanted and there are none."""
    if engine == "emulator":
        return "emulated"
    if engine == "vllm":
        names = sorted({gpu.name for gpu in machine.find_gpus()})
        return ", ".join(names)
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {len(machine.cores())} cores"
    return f"{len(machine.cores())} cores"


async def _probe(url: str, llm: str, grid: Grid, file: Path, fraction: float, work: Work, engine: str) -> Steps:
    async with open_endpoint(url, llm) as endpoint:
        facts = await endpoint.facts()
        about = {"llm": llm, "model": facts.model, "engine": facts.version, "fraction": fraction}
        return await probe(endpoint, grid, Journal(file, about), work, engine)


class _Session:
    """Engines of one model, started one after another."""

    def __init__(
        self,
        *,
        model: str,
        llm: str,
        device_type: str,
        limits: Limits,
        choice: EngineChoice,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.work = Work(on_progress)
        self._model = model
        self._llm = llm
        self._device_type = device_type
        self._limits = limits
        self._choice = choice

    def expect(self, engine: str, guesses_s: Mapping[str, float]) -> None:
        """Expect an engine's start and its measurements."""
        self.work.expect(engine, {f"start of {engine}": _GUESSED_START_S, **guesses_s})

    def on_engine(self, engine: str, size: int, fraction: float, work: Callable[[str], T]) -> T:
        """Start it, do the work at its own URL, stop it."""
        from scepsy.deployment import deploy

        self.work.tell(f"{self._llm}, {engine}")
        begun_s = time.perf_counter()
        with deploy(
            self._plan(size, fraction),
            engine=self._choice.engine,
            profiles=self._choice.profiles,
            command=self._choice.command,
            engine_args=self._choice.engine_args,
            name=f"profile-{self._llm}".replace("/", "-"),
        ) as running:
            (replica,) = running.status().replicas
            took_s = time.perf_counter() - begun_s
            self.work.finish(f"start of {engine}", f"engine ready after {took_s:.0f} s", took_s=took_s)
            return work(replica.url)

    def _plan(self, size: int, fraction: float) -> Plan:
        part = LLMPlan(
            llm=self._llm,
            model=self._model,
            tensor_parallel_size=size,
            fraction=fraction,
            replicas=1,
            slots=(Slot(node="node0", devices=tuple(range(size))),),
            max_num_seqs=self._limits.max_num_seqs,
            max_num_batched_tokens=self._limits.max_num_batched_tokens,
            max_model_len=self._limits.max_model_len,
            gpu_memory_utilization=self._limits.gpu_memory_utilization,
        )
        return Plan(cluster=parse_cluster(f"{size}x{self._device_type}"), rate_rps=0.0, llms=(part,))
