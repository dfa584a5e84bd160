"""Profiles of LLMs: estimated without a GPU, measured on a running engine, or shipped with Scepsy."""

from scepsy.profiling.estimating import estimate
from scepsy.profiling.measuring import EngineFlags, measure
from scepsy.profiling.shipped import shipped_profiles

__all__ = ["EngineFlags", "estimate", "measure", "shipped_profiles"]
