"""The main job in calls: traces to workload, workload to plan, plan to running engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from scepsy.discovery import SOURCES, Source, discover_cluster
from scepsy.files import load_cluster, load_profile
from scepsy.traces import read_executions
from scepsy_optimizer.allocation import MAX_UTILISATION
from scepsy_optimizer.cluster import Cluster, parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.planner import optimize as optimize_workload
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.questions import optimize_devices, optimize_rate
from scepsy_optimizer.workload import Workload
from scepsy_optimizer.workload import aggregate as aggregate_executions

if TYPE_CHECKING:
    from scepsy.deployment import Deployment

Traces = str | Path | Sequence[str | Path]
Profiles = str | Path | Sequence[str | Path] | Mapping[str, LLMProfile]


Rate = float | Mapping[str, float]


def aggregate(traces: Traces, *, rates: Mapping[str, float] | None = None) -> Workload:
    """Read trace files, or directories of them, and aggregate their executions.

    With `rates`, executions per second by workflow, each workflow counts by its rate rather than by how often it was
    traced. Raises ScepsyError.
    """
    paths = [traces] if isinstance(traces, str | Path) else list(traces)
    return aggregate_executions(read_executions(paths).executions, rates_rps=rates)


def optimize(
    traces: Traces | Workload,
    *,
    cluster: str | Path | Cluster,
    rate: Rate | None = None,
    max_latency_s: float | None = None,
    profiles: Profiles | None = None,
    models: Mapping[str, str] | None = None,
    max_utilisation: float = MAX_UTILISATION,
) -> Plan:
    """The plan of least mean latency for `rate` executions per second.

    With a `max_latency_s` as well, the plan that takes the fewest devices for both; with only that, the plan for the
    highest rate within it. The rate is of all traced workflows as they were mixed, or, given as a mapping, of each
    workflow by its name.

    `cluster` is a short form such as "8xH100", a cluster file, or a `Cluster`. `profiles` are profile files, a
    directory of them, or a mapping by LLM name; LLMs without one are estimated from `models` (LLM name to Hugging Face
    id or directory), or taken from the profiles that ship with Scepsy. Raises ScepsyError.
    """
    return _plan(traces, cluster, rate, max_latency_s, profiles, models, max_utilisation)[0]


def optimize_and_deploy(
    traces: Traces | Workload,
    *,
    cluster: str | Path | Cluster,
    rate: Rate | None = None,
    max_latency_s: float | None = None,
    profiles: Profiles | None = None,
    models: Mapping[str, str] | None = None,
    **deploy_options: Any,
) -> Deployment:
    """Plan for the traces and start the plan's engines behind one endpoint.

    `deploy_options` go to `scepsy.deploy` (engine, host, port, name, command, ...). The deployment's `url` is what the
    workflow's clients take as their base URL. Raises ScepsyError.
    """
    from scepsy.deployment import deploy

    plan, found = _plan(traces, cluster, rate, max_latency_s, profiles, models, MAX_UTILISATION)
    return deploy(plan, profiles=found, **deploy_options)


def _plan(
    traces: Traces | Workload,
    cluster: str | Path | Cluster,
    rate: Rate | None,
    max_latency_s: float | None,
    profiles: Profiles | None,
    models: Mapping[str, str] | None,
    max_utilisation: float,
) -> tuple[Plan, dict[str, LLMProfile]]:
    resolved = resolve_cluster(cluster)
    rates = rate if isinstance(rate, Mapping) else None
    if rates is not None and isinstance(traces, Workload):
        raise ScepsyError("rates by workflow belong to the aggregation: give them to aggregate, and their sum here")
    workload = traces if isinstance(traces, Workload) else aggregate(traces, rates=rates)
    llms = [demand.llm for demand in workload.demands]
    found = resolve_profiles(llms, resolved.device_type, profiles=profiles, models=models)
    common: dict[str, Any] = {
        "max_utilisation": max_utilisation,
        "replay_seed": 0,
        "provenance": provenance(found, None if isinstance(traces, Workload) else traces),
    }
    total = sum(rate.values()) if isinstance(rate, Mapping) else rate
    if total is None:
        if max_latency_s is None:
            raise ScepsyError("nothing to plan for: give a rate, a latency limit, or both")
        return optimize_rate(workload, found, resolved, latency_s=max_latency_s, **common), found
    if max_latency_s is None:
        return optimize_workload(workload, found, resolved, rate_rps=total, **common), found
    return optimize_devices(workload, found, resolved, rate_rps=total, latency_s=max_latency_s, **common), found


def resolve_cluster(cluster: str | Path | Cluster) -> Cluster:
    """A `Cluster` from its short form, its file, or itself; "auto", "local", "ray" or "kubernetes" finds it.

    Raises ScepsyError.
    """
    if isinstance(cluster, Cluster):
        return cluster
    if cluster in SOURCES:
        return discover_cluster(cast("Source", cluster))
    if isinstance(cluster, Path) or Path(cluster).suffix in {".yaml", ".yml", ".json"}:
        return load_cluster(cluster)
    return parse_cluster(cluster)


def resolve_profiles(
    llms: Sequence[str],
    device_type: str,
    *,
    profiles: Profiles | None = None,
    models: Mapping[str, str] | None = None,
) -> dict[str, LLMProfile]:
    """A profile for each LLM on the device type: given ones first, then estimates of `models`, then shipped ones.

    Raises ScepsyError where an LLM has none, saying how to get one.
    """
    from scepsy.profiling import estimate, shipped_profiles

    given = _given_profiles(profiles, device_type)
    shipped = shipped_profiles(device_type)
    found: dict[str, LLMProfile] = {}
    for llm in llms:
        if llm in given:
            found[llm] = given[llm]
        elif models is not None and llm in models:
            found[llm] = estimate(models[llm], device_type, llm=llm)
        elif llm in shipped:
            found[llm] = shipped[llm]
    missing = [llm for llm in llms if llm not in found]
    if missing:
        known = ", ".join(sorted({*given, *shipped})) or "none"
        raise ScepsyError(
            f"no profile of {', '.join(missing)} on {device_type} (there are: {known}). Name the model behind each, "
            f"such as --model {missing[0]}=Qwen/Qwen3-8B, or give profile files with --profiles"
        )
    return found


def _given_profiles(profiles: Profiles | None, device_type: str) -> dict[str, LLMProfile]:
    if profiles is None:
        return {}
    if isinstance(profiles, Mapping):
        return dict(profiles)
    paths: list[Path] = []
    for item in [profiles] if isinstance(profiles, str | Path) else profiles:
        path = Path(item)
        paths += sorted(path.glob("*.y*ml")) if path.is_dir() else [path]
    loaded = [load_profile(path) for path in paths]
    return {profile.llm: profile for profile in loaded if profile.device_type == device_type}


def provenance(profiles: Mapping[str, LLMProfile], traces: Traces | None) -> dict[str, str]:
    """Where a plan's numbers come from, for the plan file."""
    from scepsy import __version__

    sources = {
        llm: ", ".join(text for text in asdict(profile.provenance).values() if text)
        for llm, profile in profiles.items()
    }
    found = {"scepsy": __version__, "made": datetime.now(UTC).isoformat(timespec="seconds")}
    if traces is not None:
        paths = [traces] if isinstance(traces, str | Path) else traces
        found["traces"] = ", ".join(str(path) for path in paths)
    return found | {f"profile of {llm}": source for llm, source in sources.items()}
