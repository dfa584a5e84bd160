"""Profiles, clusters, plans and requirements as YAML (or JSON) files: versioned, readable, checked on load.

A file that does not fit is one ScepsyError that names the file, the place in it and what is wrong there.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from scepsy_optimizer.cluster import Cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan, unknown_devices
from scepsy_optimizer.profile import LLMProfile
from scepsy_optimizer.requirements import Requirements

T = TypeVar("T")

PROFILE_FORMAT: Final = "scepsy-profile/1"
CLUSTER_FORMAT: Final = "scepsy-cluster/1"
PLAN_FORMAT: Final = "scepsy-plan/1"
REQUIREMENTS_FORMAT: Final = "scepsy-requirements/1"

_ORIGINS: Final = {"plan": ", as scepsy optimize writes it", "profile": ", as scepsy profile writes it"}


def load_profile(path: str | Path) -> LLMProfile:
    """Read a profile file. Raises ScepsyError."""
    return _load(Path(path), PROFILE_FORMAT, TypeAdapter(LLMProfile))


def save_profile(profile: LLMProfile, path: str | Path) -> None:
    """Write a profile file."""
    _save(Path(path), PROFILE_FORMAT, TypeAdapter(LLMProfile), profile)


def profile_text(profile: LLMProfile) -> str:
    """What a profile file of it says."""
    return _text(PROFILE_FORMAT, TypeAdapter(LLMProfile), profile)


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster file. Raises ScepsyError."""
    return _load(Path(path), CLUSTER_FORMAT, TypeAdapter(Cluster))


def save_cluster(cluster: Cluster, path: str | Path) -> None:
    """Write a cluster file."""
    _save(Path(path), CLUSTER_FORMAT, TypeAdapter(Cluster), cluster)


def load_plan(path: str | Path) -> Plan:
    """Read a plan file. Raises ScepsyError, also for a replica on devices that the plan's cluster does not have."""
    plan = _load(Path(path), PLAN_FORMAT, TypeAdapter(Plan))
    if wrong := unknown_devices(plan):
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ScepsyError(f"{path}: plan: {wrong[0]}{more}; correct its slots")
    return plan


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write a plan file."""
    _save(Path(path), PLAN_FORMAT, TypeAdapter(Plan), plan)


def require_writable(path: str | Path) -> None:
    """Raise ScepsyError where a file cannot be written: better told before what takes long than after it."""
    target = Path(path)
    if target.is_dir():
        raise ScepsyError(f"{path}: cannot be written: it is a directory; name a file")
    # Directories that are not there yet are made.
    there = next(one for one in (target, *target.absolute().parents) if one.exists())
    if there != target and not there.is_dir():
        raise ScepsyError(f"{path}: cannot be written: {there} is no directory")
    if not os.access(there, os.W_OK):
        raise ScepsyError(f"{path}: cannot be written: permission denied for {there}")


def plan_text(plan: Plan) -> str:
    """What a plan file of it says."""
    return _text(PLAN_FORMAT, TypeAdapter(Plan), plan)


def load_requirements(path: str | Path) -> Requirements:
    """Read a file of requirements on a plan. Raises ScepsyError."""
    return _load(Path(path), REQUIREMENTS_FORMAT, TypeAdapter(Requirements))


class _CompactDumper(yaml.SafeDumper):
    """YAML in which a list of plain values stands on one line: a row of a table stays a row."""


def _represent_sequence(dumper: _CompactDumper, value: Sequence[Any]) -> yaml.Node:
    flat = all(not isinstance(item, (list, tuple, dict)) for item in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flat)


_CompactDumper.add_representer(list, _represent_sequence)
_CompactDumper.add_representer(tuple, _represent_sequence)


def _save(path: Path, form: str, adapter: TypeAdapter[T], value: T) -> None:
    text = _text(form, adapter, value)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ScepsyError(f"{path}: cannot be written: {error.strerror}") from error


def _text(form: str, adapter: TypeAdapter[T], value: T) -> str:
    content = {"format": form, **adapter.dump_python(value, mode="json")}
    return yaml.dump(content, Dumper=_CompactDumper, sort_keys=False, width=120, allow_unicode=True)


def _load(path: Path, form: str, adapter: TypeAdapter[T]) -> T:
    kind = _kind(form)
    wanted = f"expected a {kind} file{_ORIGINS.get(kind, '')}"
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())  # noqa: S506 - a safe loader, the C one
    except FileNotFoundError as error:
        raise ScepsyError(f"{path}: no such file; {wanted}") from error
    except OSError as error:
        raise ScepsyError(f"{path}: cannot be read: {error.strerror}; {wanted}") from error
    except UnicodeDecodeError as error:
        raise ScepsyError(f"{path}: is not text; {wanted}") from error
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        place = f" line {where.line + 1}" if where is not None else ""
        raise ScepsyError(
            f"{path}{place}: not valid YAML or JSON: {getattr(error, 'problem', error)}; {wanted}"
        ) from error
    if content is None:
        raise ScepsyError(f"{path}: is empty; {wanted}")
    if not isinstance(content, Mapping):
        raise ScepsyError(f"{path}: has {'text' if isinstance(content, str) else 'a list'} at its top; {wanted}")
    found = content.get("format")
    if found != form:
        if isinstance(found, str) and found.startswith("scepsy-") and _kind(found) != kind:
            raise ScepsyError(f"{path}: is a {_kind(found)} file; {wanted}")
        raise ScepsyError(f"{path}: expected format {form!r}, found {found!r}")
    body = {key: value for key, value in content.items() if key != "format"}
    try:
        value = adapter.validate_python(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ScepsyError(f"{path}: at {place}: {first['msg']}{more}") from error
    except ScepsyError as error:
        raise ScepsyError(f"{path}: {error}") from error
    unknown = _unknown_key(body, adapter.dump_python(value, mode="json"))
    if unknown is not None:
        raise ScepsyError(f"{path}: at {unknown}: unknown key; remove it or correct its name")
    return value


def _kind(form: str) -> str:
    return form.removeprefix("scepsy-").split("/")[0]


def _loader() -> Any:
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _unknown_key(given: Any, understood: Any) -> str | None:
    """The path of the first key that validation passed over, such as "llms.0.replica"; None if there is none."""
    if isinstance(given, Mapping) and isinstance(understood, Mapping):
        children = [(key, given[key]) for key in given]
        for key, _ in children:
            if key not in understood:
                return str(key)
    elif isinstance(given, (list, tuple)) and isinstance(understood, (list, tuple)):
        children = list(enumerate(given))
    else:
        return None
    for key, child in children:
        inner = _unknown_key(child, understood[key])
        if inner is not None:
            return f"{key}.{inner}"
    return None
