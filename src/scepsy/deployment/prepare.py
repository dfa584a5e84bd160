"""From a plan to what is started on this machine, after checking that the machine can."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from scepsy.deployment import machine, processes, quota
from scepsy.deployment.specs import DEFAULT_COMMAND, Engine, ReplicaSpec, emulator_specs, vllm_cpu_specs, vllm_specs
from scepsy.files import profile_text
from scepsy_optimizer.engine import Engine as EngineModel
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import LLMPlan, Plan
from scepsy_optimizer.profile import GIB, Profiles, find_profile, profiles_of


def prepare(
    plan: Plan,
    engine: Engine,
    *,
    profiles: Profiles,
    directory: Path,
    command: Sequence[str] | None,
    engine_args: Sequence[str],
    seed: int,
    on_event: Callable[[str], None],
    mps_directory: str | None = None,
    kv_cache_bytes: bool = False,
    otlp_endpoint: str | None = None,
) -> tuple[tuple[ReplicaSpec, ...], str | None]:
    """The replicas to start, and the folder of the MPS daemon to start before them, if one is needed.

    `mps_directory` is that of a daemon that is there already. `kv_cache_bytes` and `otlp_endpoint` are as in `deploy`.
    Raises ScepsyError where this machine lacks what the plan needs.
    """
    ports = processes.free_ports(sum(part.replicas for part in plan.llms))
    words = tuple(command or DEFAULT_COMMAND)
    fractions = any(part.fraction < 1 for part in plan.llms)
    if engine == "emulator":
        files = _profile_files(plan, profiles, directory)
        return emulator_specs(plan, ports=ports, profile_files=files, seed=seed), None
    if engine == "vllm-cpu":
        _check_command(words)
        if fractions:
            quota.check_quota()
        specs = vllm_cpu_specs(
            plan,
            ports=ports,
            cores=machine.cores(),
            kv_cache_gib=_kv_cache_gib(plan, profiles),
            command=words,
            engine_args=engine_args,
            otlp_endpoint=otlp_endpoint,
        )
        return specs, None
    # A machine with GPUs of several types, or with MIG instances, is several nodes, which their UUIDs bring together.
    if len(plan.cluster.nodes) > 1 and not all(node.uuids for node in plan.cluster.nodes):
        raise ScepsyError(
            f"the plan has {len(plan.cluster.nodes)} nodes, but engine 'vllm' starts everything on this machine; "
            f"plan for one node, such as --cluster 8x{plan.cluster.device_type}"
        )
    gpus = machine.find_gpus()
    for remark in machine.check_gpus(plan, gpus):
        on_event(remark)
    _check_command(words)
    mps = started = None
    if fractions:
        mps = mps_directory or machine.running_mps()
        if mps is None:
            machine.mps_command()
            # Only named: whoever starts the daemon makes it, so that nothing is left where nobody does.
            mps = started = f"{tempfile.gettempdir()}/scepsy-mps-{secrets.token_hex(4)}"
    specs = vllm_specs(
        plan,
        ports=ports,
        command=words,
        engine_args=engine_args,
        gpus=[gpu.uuid for gpu in gpus],
        host_cores={gpu.uuid: gpu.cores for gpu in gpus},
        mps_pipe_directory=mps,
        kv_cache_bytes=_kv_cache_bytes(plan, profiles) if kv_cache_bytes else None,
        otlp_endpoint=otlp_endpoint,
    )
    return specs, started


def _check_command(words: tuple[str, ...]) -> None:
    if shutil.which(words[0]) is None:
        raise ScepsyError(
            f"cannot find {words[0]!r} to start engines with; install it (pip install 'scepsy[vllm]') "
            'or name it, such as --command "/path/to/python -m vllm.entrypoints.openai.api_server"'
        )


def _kv_cache_gib(plan: Plan, profiles: Profiles) -> list[int]:
    """Whole GiB of KV cache of each rank, for each group: 1 where the LLM has no profile."""
    return [max(1, int(_kv_bytes(part, profiles) // GIB)) if part.llm in profiles else 1 for part in plan.llms]


def _kv_cache_bytes(plan: Plan, profiles: Profiles) -> list[int]:
    missing = sorted({part.llm for part in plan.llms} - set(profiles))
    if missing:
        raise ScepsyError(f"a KV cache in bytes needs a profile of each LLM, and there is none of {', '.join(missing)}")
    return [int(_kv_bytes(part, profiles)) for part in plan.llms]


def _kv_bytes(part: LLMPlan, profiles: Profiles) -> float:
    """The KV cache on each device that the plan counts on."""
    profile = find_profile(profiles_of(profiles, part.llm), part.device_type)
    tokens = profile.kv_tokens(part.tensor_parallel_size, part.fraction)
    return tokens * profile.at(part.tensor_parallel_size).kv_bytes_per_token


def _profile_files(plan: Plan, profiles: Profiles, directory: Path) -> list[str]:
    files = []
    for index, text in enumerate(profile_texts(plan, profiles)):
        path = directory / "profiles" / f"{index}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        files.append(str(path))
    return files


def profile_texts(plan: Plan, profiles: Profiles) -> list[str]:
    """A profile file's text for each group, its limits as planned.

    Raises ScepsyError where a profile is missing or its weights do not fit.
    """
    texts = []
    for part in plan.llms:
        if part.llm not in profiles:
            raise ScepsyError(f"engine 'emulator' needs a profile of each LLM, and there is none of {part.llm!r}")
        profile = find_profile(profiles_of(profiles, part.llm), part.device_type)
        planned = replace(
            profile,
            max_num_seqs=part.max_num_seqs,
            max_num_batched_tokens=part.max_num_batched_tokens,
            max_model_len=part.max_model_len,
            gpu_memory_utilization=part.gpu_memory_utilization,
        )
        # Says here, before anything is started, that the weights do not fit.
        EngineModel(planned, tensor_parallel_size=part.tensor_parallel_size, fraction=part.fraction)
        texts.append(profile_text(planned))
    return texts
