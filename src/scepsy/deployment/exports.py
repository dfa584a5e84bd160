"""A plan for those who route or deploy with something else: pure texts in the formats of others.

Formats as read in LiteLLM's proxy documentation, in SMG 1.13's strict discovery file, in the fields of the LLMConfig of
Ray 2.60, and in production-stack's chart 0.1.12. What a format cannot say of a plan, such as which GPUs, is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import yaml

from scepsy.deployment.specs import SHUTDOWN_S, replica_ids
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import LLMPlan, Plan

VLLM_IMAGE_TAG: Final = "v0.32.0"
"""The version whose options are exported."""


def export(plan: Plan, to: str, urls: Sequence[str] = ()) -> str:
    """The plan in the format named `to`, one of `export_formats.DESCRIPTIONS`.

    `urls` are the addresses of the replicas in the plan's order, for the formats that name them. Raises ScepsyError for
    another format, or where addresses are missing.
    """
    formats: Mapping[str, Callable[[Plan, Sequence[str]], str]] = {
        "litellm": _litellm,
        "smg": _smg,
        "ray-serve": _ray_serve,
        "production-stack": _production_stack,
    }
    if to not in formats:
        raise ScepsyError(f"export to {to!r}: use one of {', '.join(formats)}")
    replicas = sum(part.replicas for part in plan.llms)
    if to in ("litellm", "smg") and len(urls) != replicas:
        raise ScepsyError(
            f"{to} needs the addresses of the plan's {replicas} replicas, and {len(urls)} are given: name a running "
            "deployment (--name), or give them in the plan's order (--url)"
        )
    return formats[to](plan, urls)


def _litellm(plan: Plan, urls: Sequence[str]) -> str:
    listed = [
        {
            "model_name": part.llm,
            "litellm_params": {
                # Whatever speaks OpenAI's API, vLLM included; the part after the prefix is what is asked for there.
                "model": f"hosted_vllm/{part.llm}",
                "api_base": f"{url}/v1",
                "api_key": "none",
                "weight": round(part.replica_weight, 6),
            },
            "model_info": {"id": name},
        }
        for (name, part, _), url in zip(replica_ids(plan), urls, strict=True)
    ]
    return _yaml({"model_list": listed, "router_settings": {"routing_strategy": "least-busy"}})


def _smg(_plan: Plan, urls: Sequence[str]) -> str:
    # Any key that it does not know makes SMG refuse the file.
    return json.dumps({"version": 1, "workers": [{"url": url} for url in urls]}, indent=2) + "\n"


def _ray_serve(plan: Plan, _urls: Sequence[str]) -> str:
    """As `LLMConfig(**entry)` takes them: a list, whose entries of one model are deployments of their own."""
    listed = []
    for part in plan.llms:
        engine: dict[str, Any] = {
            "tensor_parallel_size": part.tensor_parallel_size,
            "max_num_seqs": part.max_num_seqs,
            "max_num_batched_tokens": part.max_num_batched_tokens,
            "max_model_len": part.max_model_len,
            "gpu_memory_utilization": round(part.gpu_memory_utilization * part.fraction, 4),
        }
        # Ray Serve takes fractions only of one device; more than one bundle is a tensor-parallel group.
        bundles = [{"GPU": part.fraction if part.fraction < 1 else 1} for _ in range(part.tensor_parallel_size)]
        listed.append(
            {
                "model_loading_config": {"model_id": part.llm, "model_source": part.model},
                "engine_kwargs": engine,
                "placement_group_config": {"bundles": bundles, "strategy": "STRICT_PACK"},
                "deployment_config": {"num_replicas": part.replicas},
            }
        )
    return yaml.safe_dump(listed, sort_keys=False, width=1000)


def _production_stack(plan: Plan, _urls: Sequence[str]) -> str:
    taken: dict[str, int] = {}
    specs = [_model_spec(part, taken) for part in plan.llms]
    # The chart's own strategy starts the new pod beside the old one, for which a planned cluster has no room.
    strategy = {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}
    engines = {"strategy": strategy, "modelSpec": specs}
    return _yaml({"servingEngineSpec": engines, "routerSpec": {"routingLogic": "roundrobin"}})


def _model_spec(part: LLMPlan, taken: dict[str, int]) -> dict[str, Any]:
    """One group of replicas alike; the chart wants a name of its own for each."""
    word = "".join(letter if letter.isalnum() else "-" for letter in part.llm.lower()).strip("-") or "llm"
    number = taken[word] = taken.get(word, 0) + 1
    spec: dict[str, Any] = {
        "name": word if number == 1 else f"{word}-{number}",
        "repository": "vllm/vllm-openai",
        "tag": VLLM_IMAGE_TAG,
        "modelURL": part.model,
        "replicaCount": part.replicas,
        # The chart wants them. A process of vLLM's per GPU, and two that serve and schedule, each with its core.
        "requestCPU": part.tensor_parallel_size + 2,
        "requestMemory": f"{4 * (part.tensor_parallel_size + 2)}Gi",
        "requestGPU": part.tensor_parallel_size,
        "vllmConfig": {
            "tensorParallelSize": part.tensor_parallel_size,
            "maxModelLen": part.max_model_len,
            "maxNumSeqs": part.max_num_seqs,
            "gpuMemoryUtilization": part.gpu_memory_utilization,
            # Without a word the chart turns off what vLLM has on.
            "enablePrefixCaching": True,
            "extraArgs": [
                *("--served-model-name", part.llm),
                *("--max-num-batched-tokens", str(part.max_num_batched_tokens)),
                *("--shutdown-timeout", str(SHUTDOWN_S)),
                *("--enable-per-request-metrics", "--enable-prompt-tokens-details"),
            ],
        },
    }
    if part.fraction < 1:
        percent = str(round(100 * part.fraction))
        spec |= {"requestGPUCores": percent, "requestGPUMemPercentage": percent}
        spec |= {"limitGPUCores": percent, "limitGPUMemPercentage": percent}
    nodes = sorted({slot.node for slot in part.slots})
    terms = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": nodes}]}
    return spec | {"nodeSelectorTerms": [terms]}


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=False, width=1000)
