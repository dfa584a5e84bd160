"""`scepsy deploy --to kubernetes`: print the manifests of a plan, or apply them."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Final

from scepsy.deployment.on_kubernetes.options import MODES, SHARING, KubernetesOptions

if TYPE_CHECKING:
    from rich.console import Console

    from scepsy_optimizer.plan import Plan

FIXED: Final = ("engine", "engine_command", "port")
"""Options of the other targets that the manifests leave no choice in."""

ONLY: Final = ("image", "namespace", "mode", "sharing", "secret", "model_cache", "apply", "context", "wait", "remove")
"""Options that only manifests have a use for."""


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """What only this target takes."""
    group.add_argument("--image", default="", help="container image with vLLM and scepsy")
    group.add_argument("--namespace", default="default", help="default: default")
    group.add_argument(
        "--mode",
        choices=MODES,
        default="native",
        help="native: a Deployment per replica; agent: a pod per node that deploys the node's part (default: native)",
    )
    group.add_argument("--sharing", choices=SHARING, help="native: what holds fractions of a GPU")
    group.add_argument("--secret", help="a Secret whose entries are environment variables of engines and endpoint")
    group.add_argument("--model-cache", metavar="CLAIM", help="a PersistentVolumeClaim for downloaded models")
    group.add_argument("--apply", action="store_true", help="apply the manifests instead of printing them, and wait")
    group.add_argument("--context", help="context of the kubeconfig (default: the current one)")
    group.add_argument("--wait", type=float, default=1800.0, metavar="S", help="at most so long (default: 1800)")
    group.add_argument("--remove", action="store_true", help="remove what was applied under this name")


def run(plan: Plan, args: argparse.Namespace, console: Console) -> int:
    """Print or apply."""
    from scepsy.deployment.on_kubernetes.applying import apply_manifests, connected, remove, wait_until_ready
    from scepsy.deployment.on_kubernetes.manifests import as_yaml, render

    options = KubernetesOptions(
        image=args.image,
        name=args.name if args.name != "default" else "scepsy",
        namespace=args.namespace,
        mode=args.mode,
        sharing=args.sharing,
        secret=args.secret,
        cache_claim=args.model_cache,
    )
    where = {"namespace": options.namespace, "name": options.name}

    def tell(event: str) -> None:
        console.print(event, soft_wrap=True, markup=False, highlight=False)

    if args.remove:
        with connected(args.context) as api:
            remove(api, **where, on_event=tell)
        return 0
    manifests = render(plan, options)
    if not args.apply:
        listed = {"apiVersion": "v1", "kind": "List", "items": manifests}
        sys.stdout.write(json.dumps(listed) + "\n" if args.json else as_yaml(manifests))
        return 0
    with connected(args.context) as api:
        apply_manifests(api, manifests, **where, on_event=tell)
        wait_until_ready(api, **where, timeout_s=args.wait, on_event=tell)
    tell(
        f"ready: http://{options.name}.{options.namespace}.svc:8000/v1 within the cluster; from here: kubectl "
        f"--namespace {options.namespace} port-forward service/{options.name} 8000"
    )
    return 0
