"""A plan as processes: what is started for each replica, where, with which arguments and environment. Pure."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import LLMPlan, Plan, Slot

Engine = Literal["vllm", "vllm-cpu", "emulator"]
ENGINES: Final = ("vllm", "vllm-cpu", "emulator")
LOOPBACK: Final = "127.0.0.1"
DEFAULT_COMMAND: Final = ("vllm", "serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """One replica to start.

    `env` is added to the environment of the deployer. `weight` is what it can do beside the LLM's other replicas.
    `core_quota`, if set, is the part of its core that each worker
    process of the replica may use.
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
    mps_pipe_directory: str | None = None,
) -> tuple[ReplicaSpec, ...]:
    """vLLM on the GPUs of this machine.

    `gpus` names the machine's devices in the plan's numbering (UUIDs or indices); where the plan's node has UUIDs,
    those count. A fraction becomes a share of the streaming multiprocessors under MPS, whose daemon listens in
    `mps_pipe_directory`, and the same part of the planned memory. Raises ScepsyError for fractions without a directory;
    the plan must have one node.
    """
    (node,) = plan.cluster.nodes
    uuids = node.uuids or tuple(gpus)
    specs = []
    for spec_id, group, slot, port in _replicas(plan, ports):
        part = plan.llms[group]
        named = [uuids[device] if uuids else str(device) for device in slot.devices]
        env = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(named)}
        if part.fraction < 1:
            if mps_pipe_directory is None:
                raise ScepsyError(f"{part.llm!r} takes {part.fraction:g} of a GPU, which needs NVIDIA MPS")
            env["CUDA_MPS_PIPE_DIRECTORY"] = mps_pipe_directory
            env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = f"{100 * part.fraction:g}"
        # Rounded down: replicas that share a device must not ask for more than all of it together.
        memory = math.floor(part.gpu_memory_utilization * part.fraction * 10000) / 10000
        argv = (*vllm_arguments(part, port, command=command), "--gpu-memory-utilization", f"{memory:g}", *engine_args)
        specs.append(_spec(spec_id, part, slot, port, argv, env))
    return tuple(specs)


def vllm_cpu_specs(
    plan: Plan,
    *,
    ports: Sequence[int],
    cores: Sequence[int],
    kv_cache_gib: Sequence[int] | None = None,
    command: Sequence[str] = DEFAULT_COMMAND,
    engine_args: Sequence[str] = (),
) -> tuple[ReplicaSpec, ...]:
    """vLLM for CPU: each device of the plan is one core of `cores`, the nodes' devices one after another.

    `kv_cache_gib` is the KV cache of each rank, one entry for each of the plan's groups (default 1). Raises
    ScepsyError if the cores do not suffice.
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
        argv = (*argv, *engine_args)
        quota = part.fraction if part.fraction < 1 else None
        specs.append(_spec(spec_id, part, slot, port, argv, env, quota))
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
    part: LLMPlan, port: int, *, command: Sequence[str] = DEFAULT_COMMAND, host: str = LOOPBACK
) -> tuple[str, ...]:
    """How one replica of a group is started, its share of the memory apart."""
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
        "--disable-uvicorn-access-log",
    )


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
