"""The profiles that come with Scepsy: what the demonstration serves, and a few models that many people run."""

from __future__ import annotations

from importlib.resources import as_file, files

from scepsy.files import load_profile
from scepsy_optimizer.profile import LLMProfile


def shipped_profiles(device_type: str) -> dict[str, LLMProfile]:
    """The shipped profiles on a device type by LLM name; empty where there are none."""
    with as_file(files("scepsy.profiling") / "profiles") as folder:
        loaded = [load_profile(path) for path in sorted(folder.glob(f"*_{device_type.lower()}.yaml"))]
    return {profile.llm: profile for profile in loaded}
