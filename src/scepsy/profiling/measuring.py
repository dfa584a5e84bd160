"""A profile by measurement: a running engine is asked, and its answers are timed."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from scepsy.profiling.arrivals import LoadPlan, measure_loads, three_shapes
from scepsy.profiling.calibrating import calibrate_and_check
from scepsy.profiling.checkpoint import find_checkpoint
from scepsy.profiling.endpoint import Endpoint, EngineFacts, open_endpoint
from scepsy.profiling.fitting import fit_steps
from scepsy.profiling.journal import Journal
from scepsy.profiling.memory import kv_bytes_per_token, overhead_gib, weights_gib
from scepsy.profiling.probing import DecodePoint, PrefillPoint, probe, probe_grid
from scepsy.profiling.progress import Progress, Work
from scepsy.profiling.sent import Lengths
from scepsy.profiling.shape import shape_of
from scepsy_optimizer.cluster import DEVICE_MEMORY_GIB
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import PROPORTIONAL, FractionSlowdown, LLMProfile, Provenance, StepTimes
from scepsy_optimizer.replica import saturation_rps


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFlags:
    """How an engine was started, which it does not tell by itself: vLLM's options of the same names.

    `others` are further options, which are noted and not looked into.
    """

    tensor_parallel_size: int = 1
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    others: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured: one served model on one device type. `model` is what the engine loads, if it does not say.

    `hardware` is what the device calls itself, as far as that is known.
    """

    llm: str
    device_type: str
    flags: EngineFlags
    model: str | None
    date: str
    hardware: str = ""


def measure(
    endpoint: str,
    llm: str,
    *,
    device_type: str,
    model: str | None = None,
    flags: EngineFlags | None = None,
    lengths: Sequence[Lengths] = (),
    requests_per_load: int = 100,
    journal: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    date: str | None = None,
) -> LLMProfile:
    """Measure the profile of one LLM behind a running endpoint, which must be one engine that nobody else uses.

    `endpoint` is its base URL, `llm` the served name, `model` what the engine loads (default: what it says), `flags`
    how it was started, on whole devices. With `lengths`, those of traced calls, loads of three shapes follow the steps,
    Poisson arrivals at three rates and a full engine, `requests_per_load` each; they calibrate the profile, and its
    error is told in the provenance. Points that are finished are kept in the file `journal` and not measured again.
    `on_progress` is told of each. Raises ScepsyError.
    """
    check_device(device_type)
    subject = Subject(llm=llm, device_type=device_type, flags=flags or EngineFlags(), model=model, date=date or today())
    work = Work(on_progress)
    return asyncio.run(measure_engine(endpoint, subject, lengths, requests_per_load, journal, work, endpoint))


def correct(
    profile: LLMProfile,
    endpoint: str,
    *,
    lengths: Sequence[Lengths],
    tensor_parallel_size: int = 1,
    requests_per_load: int = 100,
    journal: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> LLMProfile:
    """A profile, such as an estimate, calibrated by loads on a running engine of its LLM that nobody else uses.

    The loads are those of `measure`, without its steps. The engine must have been started with the limits of the
    profile, at `tensor_parallel_size`. Raises ScepsyError.
    """
    if not lengths:
        raise ScepsyError("a profile is corrected by calls of given lengths, and none was given")

    async def found() -> LLMProfile:
        async with open_endpoint(endpoint, profile.llm) as opened:
            facts = await opened.facts()
            about = {"llm": profile.llm, "model": facts.model, "engine": facts.version, "corrects": profile.device_type}
            kept = Journal(journal, {**about, "tensor_parallel_size": tensor_parallel_size})
            longest = min(profile.max_model_len, facts.max_model_len or profile.max_model_len)
            plan = load_plan(lengths, longest, requests_per_load)
            work = Work(on_progress)
            work.expect(endpoint, plan.guesses_s(endpoint))
            return await _calibrated(opened, profile, tensor_parallel_size, plan, kept, work, endpoint)

    return asyncio.run(found())


def check_device(device_type: str) -> None:
    """Raise ScepsyError for a device type whose memory is not known."""
    if device_type not in DEVICE_MEMORY_GIB:
        raise ScepsyError(f"device type {device_type!r} is not known; known: {', '.join(sorted(DEVICE_MEMORY_GIB))}")


def today() -> str:
    """The date of a measurement."""
    return datetime.now(UTC).date().isoformat()


async def measure_engine(
    url: str,
    subject: Subject,
    lengths: Sequence[Lengths],
    requests_per_load: int,
    journal_file: Path | None,
    work: Work,
    engine: str,
) -> LLMProfile:
    """`measure` for one of several engines, whose measurements `work` knows under the name `engine`."""
    flags = subject.flags
    async with open_endpoint(url, subject.llm) as endpoint:
        facts = await endpoint.facts()
        if not facts.max_model_len:
            raise ScepsyError(
                f"{url}/v1/models does not say how long a context may be (max_model_len): measure an engine itself, "
                "not what stands in front of several"
            )
        about = {"llm": subject.llm, "model": facts.model, "engine": facts.version, **asdict(flags)}
        about["others"] = " ".join(flags.others)
        journal = Journal(journal_file, about)
        grid = probe_grid(max_model_len=facts.max_model_len, max_num_seqs=flags.max_num_seqs, kv_tokens=facts.kv_tokens)
        plan = load_plan(lengths, facts.max_model_len, requests_per_load)
        work.expect(engine, grid.guesses_s(engine) | plan.guesses_s(engine))
        prefill, decode = await probe(endpoint, grid, journal, work, engine)
        profile = _profile(subject, facts, prefill, decode)
        if lengths:
            return await _calibrated(endpoint, profile, flags.tensor_parallel_size, plan, journal, work, engine)
    return profile


def load_plan(lengths: Sequence[Lengths], max_model_len: int, requests: int) -> LoadPlan:
    """The loads of such lengths; none without lengths."""
    return LoadPlan(shapes=three_shapes(lengths, max_model_len) if lengths else (), requests=requests)


async def _calibrated(
    endpoint: Endpoint, profile: LLMProfile, size: int, plan: LoadPlan, journal: Journal, work: Work, engine: str
) -> LLMProfile:
    """The profile calibrated by the loads, with the errors that it then has in its provenance."""
    loads = await measure_loads(endpoint, profile, size, plan, journal, work, engine)
    found, errors = calibrate_and_check(profile, loads.points)
    # The median: a load that alone tells one of the scalars has no prediction worth the name without it.
    error = statistics.median(abs(error) for error in errors)
    full = saturation_rps(found, size, 1.0, loads.full_shape) / loads.full_rps - 1
    note = (
        f"{found.provenance.note}; median error of calls at a load that was left out {error:.1%}, "
        f"saturation rate {full:+.1%}"
    )
    return replace(found, provenance=replace(found.provenance, note=note))


def _profile(
    subject: Subject, facts: EngineFacts, prefill: Sequence[PrefillPoint], decode: Sequence[DecodePoint]
) -> LLMProfile:
    flags, model = subject.flags, subject.model or facts.model
    return LLMProfile(
        llm=subject.llm,
        model=model,
        device_type=subject.device_type,
        device_memory_gib=DEVICE_MEMORY_GIB[subject.device_type],
        steps=(_steps(facts, model, flags, prefill, decode),),
        provenance=Provenance(
            source="measured",
            tool=f"scepsy {version('scepsy')}",
            engine=f"vllm {facts.version}",
            date=subject.date,
            hardware=subject.hardware,
            flags=_flags(flags, facts.max_model_len),
            note=f"{len(prefill)} prefill and {len(decode)} decode points",
        ),
        # A quota of a core slows everything in proportion; what a share of a GPU does is measured by itself.
        slowdown=PROPORTIONAL if subject.device_type == "CPU" else FractionSlowdown(),
        # The engine's own time is inside every measured step.
        host_s=0.0,
        request_s=round(statistics.median(point.request_s for point in prefill), 5),
        # The server's processes have no cores of their own there.
        request_occupies=subject.device_type == "CPU",
        max_num_seqs=flags.max_num_seqs,
        max_num_batched_tokens=flags.max_num_batched_tokens,
        max_model_len=facts.max_model_len,
    )


def _flags(flags: EngineFlags, max_model_len: int) -> str:
    """As a command line has them."""
    words = [f"--max-num-seqs {flags.max_num_seqs}", f"--max-num-batched-tokens {flags.max_num_batched_tokens}"]
    return " ".join([*words, f"--max-model-len {max_model_len}", *flags.others])


def _steps(
    facts: EngineFacts,
    model: str,
    flags: EngineFlags,
    prefill: Sequence[PrefillPoint],
    decode: Sequence[DecodePoint],
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
