"""Manifests put on a cluster, waited for, and removed again. Needs the extra `kubernetes`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from scepsy.deployment.on_kubernetes.options import LABEL, Manifest
from scepsy_optimizer.errors import ScepsyError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

# Every kind that is rendered: the client's class for it, and the word in its methods; in the order of removal.
_KINDS: Final = {
    "Deployment": ("AppsV1Api", "deployment"),
    "Service": ("CoreV1Api", "service"),
    "ConfigMap": ("CoreV1Api", "config_map"),
    "ResourceClaim": ("ResourceV1Api", "resource_claim"),
}
_MANAGER: Final = "scepsy"
_POLL_S: Final = 2.0
_FIRST_ERROR: Final = 400
_NOT_FOUND: Final = 404


@contextmanager
def connected(context: str | None = None) -> Iterator[ApiClient]:
    """A client of the cluster that kubectl would use, or of the one that this pod is in. Raises ScepsyError."""
    try:
        from kubernetes import client, config
    except ImportError as error:
        raise ScepsyError("applying to Kubernetes needs its client: pip install 'scepsy[kubernetes]'") from error
    load: Any = config  # its functions have no types
    try:
        load.load_kube_config(context=context)
    except config.ConfigException:
        try:
            load.load_incluster_config()
        except config.ConfigException as error:
            raise ScepsyError("no Kubernetes cluster is set up: set KUBECONFIG, or run within a pod") from error
    with client.ApiClient() as api:
        yield api


def apply_manifests(
    api: ApiClient, manifests: Sequence[Manifest], *, namespace: str, name: str, on_event: Callable[[str], None]
) -> None:
    """Create or change every object (server-side apply), then remove those of this deployment that are no more wanted.

    Raises ScepsyError with what the server says against one of them; those before it are then applied.
    """
    for one in manifests:
        _call(
            api,
            "patch",
            one["kind"],
            one["metadata"]["name"],
            namespace,
            one,
            field_manager=_MANAGER,
            force=True,
            _content_type="application/apply-patch+yaml",
        )
        on_event(f"applied {one['kind']} {one['metadata']['name']}")
    wanted = {(one["kind"], one["metadata"]["name"]) for one in manifests}
    for kind, old in _existing(api, namespace, name):
        if (kind, old["metadata"]["name"]) not in wanted:
            _delete(api, kind, old["metadata"]["name"], namespace)
            on_event(f"removed {kind} {old['metadata']['name']}")


def wait_until_ready(
    api: ApiClient, *, namespace: str, name: str, timeout_s: float, on_event: Callable[[str], None]
) -> None:
    """Until every Deployment has its pod ready. Raises ScepsyError with those that lack it, and why, after the time."""
    deadline_s = time.monotonic() + timeout_s
    ready: set[str] = set()
    while True:
        waiting = {}
        for kind, one in _existing(api, namespace, name):
            if kind == "Deployment":
                title, status = one["metadata"]["name"], one.get("status", {})
                is_current = status.get("observedGeneration", 0) >= one["metadata"].get("generation", 0)
                if is_current and status.get("readyReplicas", 0) >= one["spec"].get("replicas", 1):
                    if title not in ready:
                        on_event(f"{title} is ready")
                    ready.add(title)
                else:
                    ready.discard(title)
                    waiting[title] = _reason(status)
        if not waiting:
            return
        if time.monotonic() > deadline_s:
            told = "; ".join(f"{title}: {reason}" for title, reason in sorted(waiting.items()))
            raise ScepsyError(
                f"not ready after {timeout_s:g} s: {told}. Ask: kubectl --namespace {namespace} describe pods "
                f"--selector {LABEL}={name}"
            )
        time.sleep(_POLL_S)


def remove(api: ApiClient, *, namespace: str, name: str, on_event: Callable[[str], None]) -> None:
    """Remove all objects of a deployment. Raises ScepsyError where there are none."""
    found = list(_existing(api, namespace, name))
    if not found:
        raise ScepsyError(f"namespace {namespace!r} has nothing of a deployment {name!r}")
    for kind, one in found:
        _delete(api, kind, one["metadata"]["name"], namespace)
        on_event(f"removed {kind} {one['metadata']['name']}")


def _existing(api: ApiClient, namespace: str, name: str) -> Iterator[tuple[str, Manifest]]:
    for kind in _KINDS:
        listed = _call(api, "list", kind, namespace, label_selector=f"{LABEL}={name}", may_lack=True)
        for one in listed.get("items", ()):
            yield kind, one


def _delete(api: ApiClient, kind: str, title: str, namespace: str) -> None:
    _call(api, "delete", kind, title, namespace, propagation_policy="Background", may_lack=True)


def _reason(status: Manifest) -> str:
    for condition in status.get("conditions", ()):
        if condition.get("status") == "False" and condition.get("message"):
            return str(condition["message"])
    return "no pod is ready"


def _call(api: ApiClient, verb: str, kind: str, *args: Any, may_lack: bool = False, **options: Any) -> dict[str, Any]:
    """What the server answers, in plain values. Raises ScepsyError with what it has against it."""
    from kubernetes import client
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    group, word = _KINDS[kind]
    methods = getattr(client, group)(api)
    name = f"{verb}_namespaced_{word}"
    # The newer clients have a method of its own for answers as they come, the older ones an argument.
    raw = getattr(methods, f"{name}_without_preload_content", None)
    if raw is None:
        raw = partial(getattr(methods, name), _preload_content=False)
    try:
        answer = raw(*args, **options)
        status, text = answer.status, answer.data or answer.read()
    except ApiException as error:
        status, text = error.status or 0, error.body or str(error.reason)
    except HTTPError as error:
        raise ScepsyError(f"the Kubernetes cluster does not answer: {error}") from error
    if status < _FIRST_ERROR:
        return dict(json.loads(text))
    # Servers without DRA do not know claims: then there are none.
    if may_lack and status == _NOT_FOUND:
        return {}
    raise ScepsyError(f"Kubernetes refused to {verb} {kind} {args[0]!r}: {_message(status, text)}")


def _message(status: int, text: str | bytes) -> str:
    try:
        return str(json.loads(text)["message"])
    except (ValueError, KeyError, TypeError):
        return f"status {status}"
