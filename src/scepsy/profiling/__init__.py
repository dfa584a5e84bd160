"""Profiles of LLMs: estimated without a GPU, measured on engines, calibrated by points, or shipped with Scepsy."""

from scepsy.profiling.arrivals import traced_lengths
from scepsy.profiling.calibrating import ServingPoint, calibrate
from scepsy.profiling.engines import EngineChoice, Limits, profile_model
from scepsy.profiling.estimating import estimate
from scepsy.profiling.measuring import EngineFlags, correct, measure
from scepsy.profiling.progress import Progress
from scepsy.profiling.reports import read_points
from scepsy.profiling.sent import Lengths
from scepsy.profiling.serving import Load, Response, predict_response
from scepsy.profiling.shipped import shipped_profiles

__all__ = [
    "EngineChoice",
    "EngineFlags",
    "Lengths",
    "Limits",
    "Load",
    "Progress",
    "Response",
    "ServingPoint",
    "calibrate",
    "correct",
    "estimate",
    "measure",
    "predict_response",
    "profile_model",
    "read_points",
    "shipped_profiles",
    "traced_lengths",
]
