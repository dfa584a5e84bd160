"""From measured points to the tables of a profile."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from scepsy.profiling.estimating import rounded
from scepsy.profiling.monotone import monotone
from scepsy.profiling.probing import DecodePoint, PrefillPoint
from scepsy_optimizer.profile import StepTimes


def fit_steps(
    prefill: Sequence[PrefillPoint],
    decode: Sequence[DecodePoint],
    *,
    tensor_parallel_size: int,
    weights_gib: float,
    overhead_gib: float,
    kv_bytes_per_token: float,
) -> StepTimes:
    """Tables through the measured points.

    Batches are measured at the shortest context, longer contexts at some of them: a decode step reads the keys and
    values of batch times context tokens, so what a longer context adds is fitted as proportional to that product and
    fills the places that were not measured.
    """
    batches = sorted({point.batch for point in decode})
    contexts = sorted({point.context_tokens for point in decode})
    times = np.full((len(batches), len(contexts)), np.nan)
    for point in decode:
        times[batches.index(point.batch), contexts.index(point.context_tokens)] = point.step_s
    product = np.outer(batches, np.array(contexts) - contexts[0])
    added = times - times[:, :1]
    known = ~np.isnan(added) & (product > 0)
    slope_s = max(0.0, float((added[known] @ product[known]) / (product[known] @ product[known]))) if known.any() else 0
    filled = np.where(np.isnan(times), times[:, :1] + slope_s * product, times)
    ordered = sorted(prefill, key=lambda point: point.tokens)
    return StepTimes(
        tensor_parallel_size=tensor_parallel_size,
        batch_sizes=tuple(batches),
        context_tokens=tuple(contexts),
        decode_s=tuple(tuple(rounded(float(value)) for value in row) for row in monotone(filled)),
        prefill_tokens=tuple(point.tokens for point in ordered),
        prefill_s=tuple(rounded(float(value)) for value in monotone([point.step_s for point in ordered])),
        weights_gib=round(weights_gib, 3),
        overhead_gib=round(overhead_gib, 3),
        kv_bytes_per_token=kv_bytes_per_token,
    )
