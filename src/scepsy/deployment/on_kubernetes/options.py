"""What a plan on Kubernetes can be like, and what it is called there."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from scepsy_optimizer.errors import ScepsyError

if TYPE_CHECKING:
    from scepsy_optimizer.plan import Plan

Manifest = dict[str, Any]
Mode = Literal["native", "agent"]
Sharing = Literal["dra", "hami", "mig", "slices"]

MODES: Final = ("native", "agent")
SHARING: Final = ("dra", "hami", "mig", "slices")
LABEL: Final = "scepsy.io/deployment"
MODEL_LABEL: Final = "scepsy.io/model"
REPLICA_LABEL: Final = "scepsy.io/replica"
OBJECT_LABEL: Final = "scepsy.io/object"
PART_LABEL: Final = "scepsy.io/part"
PORT: Final = 8000
_LONGEST: Final = 52  # of 63: what a Deployment's pods add to its name has to fit as well
_NAME: Final = re.compile(r"^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$")


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesOptions:
    """How a plan is put on Kubernetes.

    `image` has vLLM and scepsy. In the "native" mode each replica is a Deployment of its own, and `sharing` says by
    what fractions of a GPU are held there; in the "agent" mode one pod per node has all of its GPUs and deploys the
    node's part of the plan by itself. `secret` names a Secret whose entries become environment variables of engines and
    endpoint (such as HF_TOKEN). `cache_claim` names a PersistentVolumeClaim for downloaded models.
    """

    image: str
    name: str = "scepsy"
    namespace: str = "default"
    mode: Mode = "native"
    sharing: Sharing | None = None
    secret: str | None = None
    cache_claim: str | None = None

    def __post_init__(self) -> None:
        for word, text in (("name", self.name), ("namespace", self.namespace)):
            if not _NAME.match(text):
                raise ScepsyError(
                    f"{word} {text!r}: Kubernetes takes lower-case letters, digits and '-', and at most 32 of them here"
                )


def object_name(options: KubernetesOptions, *words: str) -> str:
    """A name that Kubernetes takes: the deployment's and the words; what is cut or changed is told apart by a hash."""
    asked = "-".join((options.name, *words))
    plain = re.sub(r"[^a-z0-9]+", "-", asked.lower()).strip("-")
    if plain == asked and len(plain) <= _LONGEST:
        return plain
    digest = hashlib.sha256(asked.encode()).hexdigest()[:8]
    return f"{plain[: _LONGEST - 9].rstrip('-')}-{digest}"


def label_value(text: str) -> str:
    """A label's value for any text, the same for the same."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")
    if plain == text and len(plain) <= 63:
        return plain
    return f"{plain[:54].rstrip('-._')}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def check_plan(plan: Plan, options: KubernetesOptions) -> None:
    """Raise ScepsyError for what cannot be put on Kubernetes in any mode."""
    if not options.image:
        raise ScepsyError("a plan on Kubernetes needs an image with vLLM and scepsy (--image)")
    from scepsy_optimizer.placement import require_placed  # here, for the command line reads this file for its help

    require_placed(plan)
    for node in plan.cluster.nodes:
        if node.device_type == "CPU":
            raise ScepsyError(f"node {node.name!r} has no GPUs: on Kubernetes plans for GPUs are deployed")
        if "_MIG_" in node.device_type:
            raise ScepsyError(
                f"node {node.name!r} stands for MIG instances that are there already; no pod can be sent to it: plan "
                "for whole GPUs, and let --sharing mig ask for instances"
            )
