"""What calls and commands are given, resolved: a cluster, the profiles of LLMs, and where numbers come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from scepsy.discovery import SOURCES, Source, discover_cluster
from scepsy.files import load_cluster, load_profile
from scepsy_optimizer.cluster import Cluster, parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan
from scepsy_optimizer.profile import LLMProfile, Profiles, profiles_of

Traces = str | Path | Sequence[str | Path]
"""Trace files, or directories of them."""

ProfileSources = str | Path | Sequence[str | Path] | Mapping[str, LLMProfile]
"""Profile files, directories of them, or profiles by LLM name."""


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
    profiles: ProfileSources | None = None,
    models: Mapping[str, str] | None = None,
) -> dict[str, LLMProfile]:
    """A profile for each LLM on the device type: given ones first, then estimates of `models`, then shipped ones.

    Raises ScepsyError where an LLM has none, saying how to get one, and where a named file or a model is of no use.
    """
    given = _given_profiles(profiles, llms, (device_type,))
    _require_llms(models, llms)
    found, known = _find_profiles(llms, device_type, given, models)
    _require_profiles(llms, found, device_type, known)
    return found


def resolve_plan_profiles(
    plan: Plan,
    llms: Sequence[str] | None = None,
    *,
    profiles: ProfileSources | None = None,
    models: Mapping[str, str] | None = None,
) -> Profiles:
    """Profiles of a plan's LLMs, or of `llms` on its cluster, of the models that the plan names.

    Given ones come first, then estimates of `models`; then, where the plan was made with an estimate, one of the plan's
    own model rather than a shipped profile that only has the same name. The engine options in them are the plan's.
    Raises ScepsyError where an LLM has none, and where a named file or a model is of no use.
    """
    from scepsy.profiling import shipped_profiles

    planned = {part.llm: part.model for part in plan.llms}
    wanted = list(planned) if llms is None else llms
    known = list(dict.fromkeys([*planned, *wanted]))
    types = plan.cluster.device_types
    given = _given_profiles(profiles, known, types)
    _require_llms(models, known)
    shipped = {llm: one.model for kind in types for llm, one in shipped_profiles(kind).items()}
    estimated = {
        llm: model
        for llm, model in planned.items()
        if shipped.get(llm) != model and plan.provenance.get(f"profile of {llm}", "").startswith("estimate")
    }
    found = _resolve(wanted, plan.cluster, given, estimated | dict(models or {}))
    return {
        llm: _as_planned(llm, one, plan)
        if isinstance(one, LLMProfile)
        else tuple(_as_planned(llm, profile, plan) for profile in one)
        for llm, one in found.items()
    }


def resolve_cluster_profiles(
    llms: Sequence[str],
    cluster: Cluster,
    *,
    profiles: ProfileSources | None = None,
    models: Mapping[str, str] | None = None,
) -> Profiles:
    """`resolve_profiles` for every device type of a cluster; an LLM may lack a profile on some, but not on all.

    Raises ScepsyError where an LLM has none at all, and where a named file or a model is of no use.
    """
    given = _given_profiles(profiles, llms, cluster.device_types)
    _require_llms(models, llms)
    return _resolve(llms, cluster, given, models)


def _resolve(
    llms: Sequence[str], cluster: Cluster, given: Sequence[tuple[str, LLMProfile]], models: Mapping[str, str] | None
) -> Profiles:
    if len(cluster.device_types) == 1:
        single, names = _find_profiles(llms, cluster.device_type, given, models)
        _require_profiles(llms, single, cluster.device_type, names)
        return single
    found: dict[str, tuple[LLMProfile, ...]] = {}
    known: set[str] = set()
    for device_type in cluster.device_types:
        here, names = _find_profiles(llms, device_type, given, models)
        known |= names
        for llm, profile in here.items():
            found[llm] = (*found.get(llm, ()), profile)
    _require_profiles(llms, found, cluster.device_type, known)
    return found


def _find_profiles(
    llms: Sequence[str], device_type: str, given: Sequence[tuple[str, LLMProfile]], models: Mapping[str, str] | None
) -> tuple[dict[str, LLMProfile], set[str]]:
    """The profiles that there are of `llms` on a device type, and the names of all LLMs with one."""
    from scepsy.profiling import estimate, shipped_profiles

    here = {llm: profile for llm, profile in given if profile.device_type == device_type}
    shipped = shipped_profiles(device_type)
    found: dict[str, LLMProfile] = {}
    for llm in llms:
        if llm in here:
            found[llm] = here[llm]
        elif models is not None and llm in models:
            found[llm] = estimate(models[llm], device_type, llm=llm)
        elif llm in shipped:
            found[llm] = shipped[llm]
    return found, {*here, *shipped}


def _as_planned(llm: str, profile: LLMProfile, plan: Plan) -> LLMProfile:
    """The profile with the engine options that the plan's groups of the LLM are started with.

    Groups on one device type may differ in them by hand only: of an option that differs, the profile's own stays.
    """
    parts = [
        part
        for part in plan.llms
        if part.llm == llm and (part.device_type or plan.cluster.device_type) == profile.device_type
    ]
    changed: dict[str, Any] = {}
    for option in ("max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization"):
        values = {getattr(part, option) for part in parts}
        if len(values) == 1:
            changed[option] = values.pop()
    return replace(profile, **changed)


def _require_llms(models: Mapping[str, str] | None, llms: Sequence[str]) -> None:
    """Raise ScepsyError where a model is given for an LLM that there is not."""
    for llm, model in (models or {}).items():
        if llm not in llms:
            raise ScepsyError(f"--model {llm}={model}: there is no LLM {llm!r} here, only {', '.join(sorted(llms))}")


def _require_profiles(llms: Sequence[str], found: Mapping[str, object], device_type: str, known: set[str]) -> None:
    missing = [llm for llm in llms if llm not in found]
    if missing:
        raise ScepsyError(
            f"no profile of {', '.join(missing)} on {device_type} (there are: {', '.join(sorted(known)) or 'none'}). "
            f"Name the model behind each, such as --model {missing[0]}=Qwen/Qwen3-8B, or give profile files with "
            "--profiles"
        )


def _given_profiles(
    profiles: ProfileSources | None, llms: Sequence[str], device_types: Sequence[str]
) -> list[tuple[str, LLMProfile]]:
    """The profiles given, each with its LLM's name; a directory may hold profiles for anything.

    Raises ScepsyError where a file that was named is for other LLMs or devices.
    """
    if profiles is None:
        return []
    if isinstance(profiles, Mapping):
        return list(profiles.items())
    loaded: list[LLMProfile] = []
    for item in [profiles] if isinstance(profiles, str | Path) else profiles:
        path = Path(item)
        if path.is_dir():
            found = [load_profile(file) for file in sorted(path.glob("*.y*ml"))]
            if not found:
                raise ScepsyError(f"{path}: no profiles (*.yaml) in this directory; scepsy profile writes them")
            loaded += found
            continue
        profile = load_profile(path)
        if profile.llm not in llms or profile.device_type not in device_types:
            raise ScepsyError(
                f"{path}: is for {profile.llm!r} on {profile.device_type}, and needed are {', '.join(sorted(llms))} on "
                f"{', '.join(device_types)}: correct the file's llm or device_type, or leave it out"
            )
        loaded.append(profile)
    return [(profile.llm, profile) for profile in loaded]


def provenance(profiles: Profiles, traces: Traces | None) -> dict[str, str]:
    """Where a plan's numbers come from, for the plan file."""
    from scepsy import __version__

    sources = {
        llm: "; ".join(
            ", ".join(text for text in asdict(profile.provenance).values() if text)
            for profile in profiles_of(profiles, llm)
        )
        for llm in profiles
    }
    found = {"scepsy": __version__, "made": datetime.now(UTC).isoformat(timespec="seconds")}
    if traces is not None:
        paths = [traces] if isinstance(traces, str | Path) else traces
        found["traces"] = ", ".join(str(path) for path in paths)
    return found | {f"profile of {llm}": source for llm, source in sources.items()}
