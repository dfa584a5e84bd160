"""A plan as Kubernetes objects. Pure: nothing is read but the plan, nothing is written.

Native: a Deployment and a Service for each replica, pinned to the node where the plan has it, and the endpoint in front
with their addresses. Agent: a Deployment for each node whose pod has the node's GPUs and runs `scepsy deploy` on the
node's part of the plan, and the same endpoint in front. A replica of a plan never spans nodes, because the placement
keeps tensor parallelism within an NVLink domain; so nothing here needs a LeaderWorkerSet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import yaml

from scepsy.deployment.on_kubernetes.devices import GPU, Devices, fraction_of, shared_claims, whole
from scepsy.deployment.on_kubernetes.options import (
    LABEL,
    MODEL_LABEL,
    OBJECT_LABEL,
    PART_LABEL,
    PORT,
    REPLICA_LABEL,
    KubernetesOptions,
    Manifest,
    check_plan,
    label_value,
    object_name,
)
from scepsy.deployment.specs import replica_ids, vllm_arguments
from scepsy.deployment.state import API_KEY
from scepsy.files import plan_text
from scepsy_optimizer.cluster import Cluster, Node
from scepsy_optimizer.plan import LLMPlan, Plan

# Connections reach a pod for a while after it was told to end; vLLM answers them with errors from then on.
_PRE_STOP_S: Final = 10
_SHUTDOWN_S: Final = 120
_START_PROBES: Final = 180
_CONFIG: Final = "/etc/scepsy"


def render(plan: Plan, options: KubernetesOptions) -> list[Manifest]:
    """The objects of a plan, in an order in which they can be created.

    Raises ScepsyError for what the mechanisms cannot hold.
    """
    check_plan(plan, options)
    engines = _native(plan, options) if options.mode == "native" else _agents(plan, options)
    objects = [*engines, *_endpoint(plan, options)]
    for one in objects:
        metadata = one["metadata"]
        metadata["namespace"] = options.namespace
        metadata["labels"] = {LABEL: options.name, **metadata.get("labels", {})}
    return objects


def as_yaml(manifests: Sequence[Manifest]) -> str:
    """The objects as YAML documents."""
    return yaml.dump_all(manifests, Dumper=_NoAliases, sort_keys=False, width=1000)


class _NoAliases(yaml.SafeDumper):
    """Objects share labels; in YAML each writes out its own."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002 - YAML asks with it
        """Never refer to what was written before."""
        return True


def _native(plan: Plan, options: KubernetesOptions) -> list[Manifest]:
    nodes = {node.name: node for node in plan.cluster.nodes}
    objects = shared_claims(plan, options)
    for name, part, slot in replica_ids(plan):
        node = nodes[slot.node]
        devices = fraction_of(part, slot, node, plan, options) if part.fraction < 1 else whole(part)
        labels = {PART_LABEL: "engine", MODEL_LABEL: label_value(part.llm), REPLICA_LABEL: label_value(name)}
        title = object_name(options, name)
        container = _engine(part, devices, options)
        pod = _pod(container, node, devices, options)
        objects += [_deployment(title, labels, pod, devices.annotations), _service(title, labels)]
    return objects


def _agents(plan: Plan, options: KubernetesOptions) -> list[Manifest]:
    objects = []
    for node, own in _by_node(plan):
        title = object_name(options, "agent", node.name)
        labels = {PART_LABEL: "agent", REPLICA_LABEL: label_value(node.name)}
        devices = Devices(limits={GPU: str(node.devices)})
        container = _container("agent", ["scepsy", "deploy", f"{_CONFIG}/plan.yaml"], devices, options)
        container["command"] += ["--host", "0.0.0.0", "--port", str(PORT), "--name", "agent"]  # noqa: S104 - within the pod
        container["command"] += ["--drain", str(_SHUTDOWN_S)]
        # While one engine is started again the pod is not healthy as a whole, but has to go on: others serve.
        for probe in ("readinessProbe", "livenessProbe"):
            container[probe] = {**container[probe], "httpGet": {"path": "/scepsy/status", "port": PORT}}
        container["volumeMounts"].append({"name": "plan", "mountPath": _CONFIG})
        # The endpoint asks for the key and keeps it: probes and the endpoint itself come to agents without one.
        container.setdefault("env", []).append({"name": API_KEY, "value": ""})
        pod = _pod(container, node, devices, options)
        pod["volumes"].append({"name": "plan", "configMap": {"name": title}})
        objects += [
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": title, "labels": labels},
                "data": {"plan.yaml": plan_text(own)},
            },
            _deployment(title, labels, pod, _restarted_by(plan_text(own))),
            _service(title, labels),
        ]
    return objects


def _by_node(plan: Plan) -> Iterator[tuple[Node, Plan]]:
    """Each node that has replicas, and its part of the plan."""
    for node in plan.cluster.nodes:
        parts = []
        for part in plan.llms:
            slots = tuple(slot for slot in part.slots if slot.node == node.name)
            if slots:
                parts.append(replace(part, slots=slots, replicas=len(slots)))
        if parts:
            cluster = Cluster(nodes=(node,))
            yield node, replace(plan, cluster=cluster, llms=tuple(parts), prediction=None)


def _engine(part: LLMPlan, devices: Devices, options: KubernetesOptions) -> Manifest:
    argv = vllm_arguments(part, PORT, host="0.0.0.0", shutdown_s=_SHUTDOWN_S)  # noqa: S104 - within the pod
    # With HAMi and MIG what the engine sees is its part; slices, and MPS behind DRA, show the whole device's memory.
    share = part.fraction if options.sharing in ("dra", "slices") else 1.0
    memory = f"{int(part.gpu_memory_utilization * share * 10000) / 10000:g}"
    return _container("engine", (*argv, "--gpu-memory-utilization", memory), devices, options)


def _container(name: str, command: Sequence[str], devices: Devices, options: KubernetesOptions) -> Manifest:
    resources: dict[str, Any] = {}
    if devices.limits:
        resources["limits"] = dict(devices.limits)
    if devices.claims:
        resources["claims"] = [{"name": f"gpu-{number}"} for number in range(len(devices.claims))]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]  # noqa: S108 - where engines look for shared memory
    if options.cache_claim is not None:
        mounts.append({"name": "models", "mountPath": "/root/.cache/huggingface"})
    health = {"httpGet": {"path": "/health", "port": PORT}}
    container: Manifest = {
        "name": name,
        "image": options.image,
        "command": list(command),
        "ports": [{"name": "http", "containerPort": PORT}],
        "resources": resources,
        "volumeMounts": mounts,
        "startupProbe": {**health, "periodSeconds": 10, "failureThreshold": _START_PROBES},
        "readinessProbe": {**health, "periodSeconds": 5, "timeoutSeconds": 5},
        "livenessProbe": {**health, "periodSeconds": 10, "timeoutSeconds": 10, "failureThreshold": 6},
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(_PRE_STOP_S)]}}},
    }
    if devices.env:
        container["env"] = [{"name": key, "value": value} for key, value in devices.env.items()]
    if options.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": options.secret}}]
    return container


def _pod(container: Manifest, node: Node, devices: Devices, options: KubernetesOptions) -> Manifest:
    terms = [{"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node.name]}]}]
    pod: Manifest = {
        "affinity": {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}},
        },
        "tolerations": [{"key": GPU, "operator": "Exists", "effect": "NoSchedule"}],
        "terminationGracePeriodSeconds": _PRE_STOP_S + _SHUTDOWN_S + 30,
        "containers": [container],
        "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}],
    }
    if options.cache_claim is not None:
        pod["volumes"].append({"name": "models", "persistentVolumeClaim": {"claimName": options.cache_claim}})
    if devices.claims:
        pod["resourceClaims"] = [
            {"name": f"gpu-{number}", "resourceClaimName": claim} for number, claim in enumerate(devices.claims)
        ]
    return pod


def _deployment(name: str, labels: Mapping[str, str], pod: Manifest, annotations: Mapping[str, str]) -> Manifest:
    """One pod, never two at once: both would not fit on the devices."""
    metadata: Manifest = {"labels": {**labels, OBJECT_LABEL: name}}
    if annotations:
        metadata["annotations"] = dict(annotations)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": dict(labels)},
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": {OBJECT_LABEL: name}},
            "template": {"metadata": metadata, "spec": pod},
        },
    }


def _restarted_by(config: str) -> Mapping[str, str]:
    """Annotations under which a pod is made anew when what it reads at its start has changed."""
    return {f"{LABEL}/config": hashlib.sha256(config.encode()).hexdigest()}


def _service(name: str, labels: Mapping[str, str]) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": dict(labels)},
        "spec": {
            "selector": {OBJECT_LABEL: name},
            "ports": [{"name": "http", "port": PORT, "targetPort": "http"}],
        },
    }


def _endpoint(plan: Plan, options: KubernetesOptions) -> list[Manifest]:
    title = options.name
    labels = {PART_LABEL: "endpoint"}
    config = json.dumps({"backends": list(_backends(plan, options))}, indent=2)
    container: Manifest = {
        "name": "endpoint",
        "image": options.image,
        "command": ["python3", "-m", "scepsy.deployment.endpoint", f"{_CONFIG}/endpoint.json"],
        "args": ["--host", "0.0.0.0", "--port", str(PORT)],  # noqa: S104 - within the pod
        "ports": [{"name": "http", "containerPort": PORT}],
        "volumeMounts": [{"name": "config", "mountPath": _CONFIG}],
        "livenessProbe": {"httpGet": {"path": "/scepsy/status", "port": PORT}, "periodSeconds": 10},
        "readinessProbe": {"httpGet": {"path": "/scepsy/status", "port": PORT}, "periodSeconds": 5},
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(_PRE_STOP_S)]}}},
    }
    if options.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": options.secret}}]
    pod = {
        "terminationGracePeriodSeconds": _PRE_STOP_S + _SHUTDOWN_S + 30,
        "containers": [container],
        "volumes": [{"name": "config", "configMap": {"name": title}}],
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": title, "labels": labels},
            "data": {"endpoint.json": config},
        },
        _deployment(title, labels, pod, _restarted_by(config)),
        _service(title, labels),
    ]


def _backends(plan: Plan, options: KubernetesOptions) -> Iterator[Mapping[str, Any]]:
    """Where the endpoint finds each LLM: every replica, or on every node the agent that has replicas of it."""
    if options.mode == "native":
        for name, part, _ in replica_ids(plan):
            yield _backend(name, part.llm, part.model, object_name(options, name), part.replica_weight, options)
        return
    for node, own in _by_node(plan):
        weights: dict[str, float] = {}
        models = {}
        for part in own.llms:
            weights[part.llm] = weights.get(part.llm, 0.0) + part.replicas * part.replica_weight
            models[part.llm] = part.model
        for llm, weight in weights.items():
            service = object_name(options, "agent", node.name)
            yield _backend(f"{llm}@{node.name}", llm, models[llm], service, weight, options)


def _backend(
    name: str, llm: str, model: str, service: str, weight: float, options: KubernetesOptions
) -> Mapping[str, Any]:
    url = f"http://{service}.{options.namespace}.svc:{PORT}"
    return {"id": name, "llm": llm, "model": model, "url": url, "weight": round(weight, 6)}
