"""A plan as processes: what is started for each replica, where, with which arguments and environment. Pure."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal
from urllib.parse import urlsplit

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import LLMPlan, Plan, Slot

Engine = Literal["vllm", "vllm-cpu", "emulator"]
ENGINES: Final = ("vllm", "vllm-cpu", "emulator")
LOOPBACK: Final = "127.0.0.1"
DEFAULT_COMMAND: Final = ("vllm", "serve")
START_TIMEOUT_S: Final = {"vllm": 1800.0, "vllm-cpu": 600.0, "emulator": 60.0}
"""How long an engine may take until it answers: the weights of a large model come from a disk."""
SHUTDOWN_S: Final = 10
"""Less than what a shim waits between telling an engine to end and killing it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """One replica to start.

    `env` is added to the environment of the deployer. `weight` is what it can do beside the LLM's other replicas.
    `core_quota`, if set, is the part of its core that each worker process of the replica may use. `max_model_len` is
    its longest context in tokens, 0 where the plan does not say.
    """

    id: str
    llm: str
    model: str
    node: str
    devices: tuple[int, ...]
    fraction: float
    tensor_parallel_size: int
    port: int
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    weight: float = 1.0
    core_quota: float | None = None
    max_model_len: int = 0

    @property
    def url(self) -> str:
        """Where it answers, without a path."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def place(self) -> str:
        """Where it sits, for people: "node0: 0,1" or "node0: half of 3"."""
        devices = ",".join(str(device) for device in self.devices)
        return f"{self.node}: {devices}" if self.fraction == 1 else f"{self.node}: {self.fraction:g} of {devices}"

    def on_port(self, port: int) -> ReplicaSpec:
        """The same replica on another port."""
        argv = list(self.argv)
        argv[argv.index("--port") + 1] = str(port)
        return replace(self, port=port, argv=tuple(argv))


def vllm_specs(
    plan: Plan,
    *,
    ports: Sequence[int],
    command: Sequence[str] = DEFAULT_COMMAND,
    engine_args: Sequence[str] = (),
    gpus: Sequence[str] = (),
    host_cores: Mapping[str, Sequence[int]] | None = None,
    mps_pipe_directory: str | None = None,
    kv_cache_bytes: Sequence[int] | None = None,
    otlp_endpoint: str | None = None,
) -> tuple[ReplicaSpec, ...]:
    """vLLM on the GPUs of this machine.

    `gpus` names the machine's devices in the plan's numbering (UUIDs or indices); where a node of the plan has UUIDs,
    those count. `host_cores` are the cores beside each GPU, by the name that it has here: its engine stays on them.
    A fraction becomes a share of the streaming multiprocessors under MPS, whose daemon listens in
    `mps_pipe_directory`, and the same part of the planned memory. `kv_cache_bytes`, one entry for each of the plan's
    groups, is the KV cache on each GPU; without it the part of the memory is given, and vLLM measures what is left.
    `otlp_endpoint` is where engines send their spans. Raises ScepsyError for fractions without a directory.
    """
    uuids = {node.name: node.uuids or tuple(gpus) for node in plan.cluster.nodes}
    specs = []
    for spec_id, group, slot, port in _replicas(plan, ports):
        part = plan.llms[group]
        here = uuids[slot.node]
        named = [here[device] if here else str(device) for device in slot.devices]
        env = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(named)}
        if part.fraction < 1:
            if mps_pipe_directory is None:
                raise ScepsyError(f"{part.llm!r} takes {part.fraction:g} of a GPU, which needs NVIDIA MPS")
            env["CUDA_MPS_PIPE_DIRECTORY"] = mps_pipe_directory
            env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = f"{100 * part.fraction:g}"
        if kv_cache_bytes is not None:
            memory = ("--kv-cache-memory-bytes", str(kv_cache_bytes[group]))
        else:
            # Rounded down: replicas that share a device must not ask for more than all of it together.
            part_of_it = math.floor(part.gpu_memory_utilization * part.fraction * 10000) / 10000
            memory = ("--gpu-memory-utilization", f"{part_of_it:g}")
        beside = sorted({core for name in named for core in (host_cores or {}).get(name, ())})
        pinned = ("taskset", "--cpu-list", ",".join(str(core) for core in beside)) if beside else ()
        tracing, told = _tracing(otlp_endpoint, part, spec_id)
        argv = (*pinned, *vllm_arguments(part, port, command=command), *memory, *tracing, *engine_args)
        specs.append(_spec(spec_id, part, slot, port, argv, env | told))
    return tuple(specs)


def vllm_cpu_specs(
    plan: Plan,
    *,
    ports: Sequence[int],
    cores: Sequence[int],
    kv_cache_gib: Sequence[int] | None = None,
    command: Sequence[str] = DEFAULT_COMMAND,
    engine_args: Sequence[str] = (),
    otlp_endpoint: str | None = None,
) -> tuple[ReplicaSpec, ...]:
    """vLLM for CPU: each device of the plan is one core of `cores`, the nodes' devices one after another.

    `kv_cache_gib` is the KV cache of each rank, one entry for each of the plan's groups (default 1), `otlp_endpoint`
    where engines send their spans. Raises ScepsyError if the cores do not suffice.
    """
    offsets, devices = {}, 0
    for node in plan.cluster.nodes:
        offsets[node.name] = devices
        devices += node.devices
    if devices > len(cores):
        raise ScepsyError(
            f"the plan has {devices} CPU devices but this process may use {len(cores)} cores; "
            f"plan for at most {len(cores)}xCPU"
        )
    specs = []
    for spec_id, group, slot, port in _replicas(plan, ports):
        part = plan.llms[group]
        ranks = [str(cores[offsets[slot.node] + device]) for device in slot.devices]
        env = {"VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib[group] if kv_cache_gib else 1)}
        argv = (*vllm_arguments(part, port, command=command), "--enforce-eager")
        if len(ranks) == 1:
            # One process does it all and nothing else of the replica leaves the core. Between an engine and a worker
            # apart both wait by spinning, which takes half a core of whoever has the next one.
            env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
            argv = ("taskset", "--cpu-list", ranks[0], *argv, "--distributed-executor-backend", "uni")
        else:
            env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(ranks)
        tracing, told = _tracing(otlp_endpoint, part, spec_id)
        quota = part.fraction if part.fraction < 1 else None
        specs.append(_spec(spec_id, part, slot, port, (*argv, *tracing, *engine_args), env | told, quota))
    return tuple(specs)


def emulator_specs(
    plan: Plan, *, ports: Sequence[int], profile_files: Sequence[str], seed: int = 0
) -> tuple[ReplicaSpec, ...]:
    """Emulators, all nodes of the plan on this machine. `profile_files` has a file for each of the plan's groups.

    All replicas of an LLM have the same seed: which one answers does not change the answer.
    """
    specs = []
    for spec_id, group, slot, port in _replicas(plan, ports):
        part = plan.llms[group]
        argv = (
            *(sys.executable, "-m", "scepsy.emulator"),
            *("--profile", profile_files[group], "--llm", part.llm),
            *("--tensor-parallel-size", str(part.tensor_parallel_size), "--fraction", f"{part.fraction:g}"),
            *("--host", LOOPBACK, "--port", str(port), "--seed", str(seed)),
        )
        specs.append(_spec(spec_id, part, slot, port, argv, {}))
    return tuple(specs)


def replica_ids(plan: Plan) -> Iterator[tuple[str, LLMPlan, Slot]]:
    """Each replica of a plan with its id, its group and its slot, in the plan's order."""
    for name, group, slot, _ in _replicas(plan, range(sum(part.replicas for part in plan.llms))):
        yield name, plan.llms[group], slot


def vllm_arguments(
    part: LLMPlan,
    port: int,
    *,
    command: Sequence[str] = DEFAULT_COMMAND,
    host: str = LOOPBACK,
    shutdown_s: int = SHUTDOWN_S,
) -> tuple[str, ...]:
    """How one replica of a group is started, its share of the memory apart.

    A replica that is told to end may take `shutdown_s` for the answers that it has begun; without that vLLM cuts them
    off and tells clients that they are whole. Its answers have queueing times and cached tokens, which capture reads.
    """
    # `vllm serve` takes the model by position, the module that it stands for by option.
    model = (part.model,) if command[-1] == "serve" else ("--model", part.model)
    return (
        *command,
        *model,
        *("--served-model-name", part.llm),
        *("--host", host, "--port", str(port)),
        *("--tensor-parallel-size", str(part.tensor_parallel_size)),
        *("--max-num-seqs", str(part.max_num_seqs)),
        *("--max-num-batched-tokens", str(part.max_num_batched_tokens)),
        *("--max-model-len", str(part.max_model_len)),
        *("--shutdown-timeout", str(shutdown_s)),
        *("--enable-per-request-metrics", "--enable-prompt-tokens-details", "--disable-uvicorn-access-log"),
    )


def _tracing(endpoint: str | None, part: LLMPlan, spec_id: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Arguments and environment with which an engine sends its spans there, under a name that says whose they are."""
    if endpoint is None:
        return (), {}
    # vLLM's own default is gRPC, whose addresses have no path.
    has_path = urlsplit(endpoint).path.strip("/") != ""
    protocol = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"} if has_path else {}
    return ("--otlp-traces-endpoint", endpoint), {"OTEL_SERVICE_NAME": f"{part.llm}/{spec_id}"} | protocol


def _spec(
    spec_id: str,
    part: LLMPlan,
    slot: Slot,
    port: int,
    argv: tuple[str, ...],
    env: Mapping[str, str],
    core_quota: float | None = None,
) -> ReplicaSpec:
    return ReplicaSpec(
        id=spec_id,
        llm=part.llm,
        model=part.model,
        node=slot.node,
        devices=slot.devices,
        fraction=part.fraction,
        tensor_parallel_size=part.tensor_parallel_size,
        port=port,
        argv=argv,
        env=env,
        weight=part.replica_weight,
        core_quota=core_quota,
        max_model_len=part.max_model_len,
    )


def _replicas(plan: Plan, ports: Sequence[int]) -> Iterator[tuple[str, int, Slot, int]]:
    """Each replica with an id that names files and headers: the LLM's name in plain characters, and a number.

    Then comes the number of its group in the plan, its slot and its port.
    """
    taken: dict[str, int] = {}
    left = iter(ports)
    for group, part in enumerate(plan.llms):
        word = re.sub(r"[^A-Za-z0-9._-]+", "-", part.llm).strip("-.") or "llm"
        for slot in part.slots:
            number = taken.get(word, 0)
            taken[word] = number + 1
            yield f"{word}-{number}", group, slot, next(left)
