"""Which devices there are: NVML on this machine, the nodes of a Ray cluster, the nodes of a Kubernetes cluster."""

from __future__ import annotations

import os
import sys
from typing import Final, Literal, cast, get_args

from scepsy.discovery.kubernetes import discover_kubernetes
from scepsy.discovery.nvml import discover_local
from scepsy.discovery.ray import discover_ray
from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.errors import ScepsyError

Source = Literal["auto", "local", "ray", "kubernetes"]
SOURCES: Final[tuple[str, ...]] = get_args(Source)

__all__ = ["SOURCES", "Source", "discover_cluster", "discover_kubernetes", "discover_local", "discover_ray"]

_DISCOVER: Final = {"local": discover_local, "ray": discover_ray, "kubernetes": discover_kubernetes}


def discover_cluster(source: Source = "auto") -> Cluster:
    """The cluster as it is: its nodes, device types, memory, NVLink domains, and UUIDs where they are known.

    "local" asks NVML about this machine, "ray" the Ray cluster that this process belongs to or that RAY_ADDRESS names,
    "kubernetes" the cluster that kubectl is set up for. "auto" takes Ray where RAY_ADDRESS is set or Ray is connected,
    else this machine's GPUs, else Kubernetes. Raises ScepsyError where nothing is found, with what each source said.
    """
    if source != "auto":
        if source not in _DISCOVER:
            raise ScepsyError(f"cannot discover {source!r}; write one of {', '.join(SOURCES)}")
        return _DISCOVER[source]()
    if "RAY_ADDRESS" in os.environ or _ray_is_connected():
        return discover_ray()
    said = []
    for name in ("local", "kubernetes"):
        try:
            return _DISCOVER[name]()
        except ScepsyError as error:
            said.append(f"{name}: {error}")
    raise ScepsyError(f"no cluster found ({'; '.join(said)}); describe it, such as 8xH100, or in a cluster file")


def _ray_is_connected() -> bool:
    # Only a process that has imported Ray can be connected.
    ray = sys.modules.get("ray")
    return ray is not None and cast("bool", ray.is_initialized())
