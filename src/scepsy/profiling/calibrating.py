"""An estimate corrected by a few measured points.

Four numbers with priors stand for what tables of kernels cannot know of an installation: how much slower its decoding
and its prefill are, what a step and what a request cost besides. Two points already move them where they matter;
without points the priors leave the profile as it is. Gauss-Newton on the logarithmic errors of time to first token and
time per output token, in a handful of iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from scepsy.profiling.sent import Sent, emulate
from scepsy.profiling.serving import Load, Response, predict_response
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.profile import LLMProfile, StepTimes

Array = NDArray[np.float64]

# Standard deviations of the priors: logarithms of the two scales, then seconds. Steps that were measured one by one are
# believed more than estimated ones: what is left to find is how far the usual is from the undisturbed.
_PRIOR_ESTIMATED = np.array([0.20, 0.20, 0.0005, 0.020])
_PRIOR_MEASURED = np.array([0.05, 0.05, 0.0005, 0.020])
# Standard deviations of the logarithmic errors that remain: first tokens wait for whatever comes along.
_FIRST_TOKEN_NOISE = 0.25
_PER_TOKEN_NOISE = 0.05
_SATURATED = 100.0
_ITERATIONS = 12
_HALVINGS = 8
# A step so much smaller than the priors changes nothing that could be seen.
_CLOSE_ENOUGH = 0.01
_DIFFERENCE = np.array([0.01, 0.01, 1e-4, 1e-3])


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPoint:
    """One measured load of one replica on whole devices; `sent` are its requests one by one, where they are known."""

    tensor_parallel_size: int
    load: Load
    measured: Response
    sent: Sent | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What is multiplied into the tables, and added to each step and to each request."""

    decode_scale: float = 1.0
    prefill_scale: float = 1.0
    step_s: float = 0.0
    request_s: float = 0.0


def calibrate(profile: LLMProfile, points: Sequence[ServingPoint]) -> LLMProfile:
    """The profile with the correction that the points ask for, noted in its provenance.

    Two points tell most if one is of a light and one of a heavy load: the first tells what a step costs anyway, the
    second what a batch adds. All tensor parallelisms share one correction. Raises ScepsyError for a point that the
    profile cannot predict.
    """
    return calibrate_and_check(profile, points)[0] if points else profile


def calibrate_and_check(profile: LLMProfile, points: Sequence[ServingPoint]) -> tuple[LLMProfile, list[float]]:
    """`calibrate`, and the relative errors of whole calls at each point by the profile that the others calibrate.

    Not fitted again for each: near the optimum the prediction is linear in the correction, and then what is left of a
    point's own errors e is (1 - H)^-1 e, with H the point's block of the fit's hat matrix.
    """
    fit = _fit(profile, points)
    found = corrected(profile, _correction(profile, fit.theta), len(points))
    return found, [_left_out_error(fit, number, point) for number, point in enumerate(points)]


def fit_correction(profile: LLMProfile, points: Sequence[ServingPoint]) -> Correction:
    """The most probable correction, given the points and the priors. Raises ScepsyError as `calibrate`."""
    return _correction(profile, _fit(profile, points).theta)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fit:
    """The optimum, its errors (two of each point) and their slopes in it, and the priors."""

    theta: Array
    errors: Array
    slopes: Array
    prior: Array


def _fit(profile: LLMProfile, points: Sequence[ServingPoint]) -> _Fit:
    prior = _PRIOR_MEASURED if profile.provenance.source == "measured" else _PRIOR_ESTIMATED
    theta = np.zeros(4)
    error = _errors(profile, points, theta)
    for point, own in zip(points, error.reshape(len(points), -1), strict=True):
        if own[0] >= _SATURATED:
            raise ScepsyError(f"{profile.llm!r} cannot serve {point.load}: it is beyond what the profile carries")
    for _ in range(_ITERATIONS):
        slopes = _slopes(profile, points, theta, error)
        step = np.linalg.solve(slopes.T @ slopes + np.diag(prior**-2), slopes.T @ error + theta / prior**2)
        step = np.clip(step, -prior, prior)
        # Halved until it improves: a whole step may lead to where a measured load would saturate.
        for _ in range(_HALVINGS):
            tried = _errors(profile, points, theta - step)
            if _cost(tried, (theta - step) / prior) <= _cost(error, theta / prior):
                break
            step = step / 2
        else:
            break
        theta, error = theta - step, tried
        if np.all(np.abs(step) < _CLOSE_ENOUGH * prior):
            break
    return _Fit(theta=theta, errors=error, slopes=slopes, prior=prior)


def _left_out_error(fit: _Fit, number: int, point: ServingPoint) -> float:
    own = fit.slopes[2 * number : 2 * number + 2]
    normal = fit.slopes.T @ fit.slopes + np.diag(fit.prior**-2)
    hat = own @ np.linalg.solve(normal, own.T)
    first, per_token = np.linalg.solve(np.eye(2) - hat, fit.errors[2 * number : 2 * number + 2])
    guess = Response(
        first_token_s=float(point.measured.first_token_s * np.exp(first * _FIRST_TOKEN_NOISE)),
        per_token_s=float(point.measured.per_token_s * np.exp(per_token * _PER_TOKEN_NOISE)),
    )
    tokens = point.load.output_tokens
    return guess.call_s(tokens) / point.measured.call_s(tokens) - 1


def _slopes(profile: LLMProfile, points: Sequence[ServingPoint], theta: Array, error: Array) -> Array:
    slopes = np.empty((error.size, theta.size))
    for index, difference in enumerate(_DIFFERENCE):
        moved = theta.copy()
        moved[index] += difference
        slopes[:, index] = (_errors(profile, points, moved) - error) / difference
    return slopes


def _cost(error: Array, deviations: Array) -> float:
    return float(error @ error + deviations @ deviations)


def corrected(profile: LLMProfile, correction: Correction, points: int) -> LLMProfile:
    """The profile with a correction that was found from that many points."""
    note = (
        f"calibrated by {points} measured points: decode x{correction.decode_scale:.3f}, "
        f"prefill x{correction.prefill_scale:.3f}, {1000 * correction.step_s:+.2f} ms per step, "
        f"{1000 * correction.request_s:+.1f} ms per request"
    )
    old = profile.provenance
    return replace(
        profile,
        steps=tuple(_scaled(steps, correction) for steps in profile.steps),
        host_s=profile.host_s + correction.step_s,
        request_s=profile.request_s + correction.request_s,
        provenance=replace(old, note=f"{old.note}; {note}" if old.note else note),
    )


def _correction(profile: LLMProfile, theta: Array) -> Correction:
    """Costs never become negative, whatever the points say."""
    return Correction(
        decode_scale=float(np.exp(theta[0])),
        prefill_scale=float(np.exp(theta[1])),
        step_s=max(-profile.host_s, float(theta[2])),
        request_s=max(-profile.request_s, float(theta[3])),
    )


def _scaled(steps: StepTimes, correction: Correction) -> StepTimes:
    return replace(
        steps,
        decode_s=tuple(tuple(value * correction.decode_scale for value in row) for row in steps.decode_s),
        prefill_s=tuple(value * correction.prefill_scale for value in steps.prefill_s),
    )


def _errors(profile: LLMProfile, points: Sequence[ServingPoint], theta: Array) -> Array:
    """Logarithmic errors over their noise: of each point its first token, then its time per token.

    A load that the profile cannot carry has the error `_SATURATED`.
    """
    changed = corrected(profile, _correction(profile, theta), len(points))
    found = []
    for point in points:
        if point.sent is not None:
            predicted = emulate(changed, point.tensor_parallel_size, point.sent)
        else:
            predicted = predict_response(changed, point.tensor_parallel_size, point.load)
        if not np.isfinite(predicted.first_token_s):
            found += [_SATURATED, _SATURATED]
            continue
        found.append(np.log(predicted.first_token_s / point.measured.first_token_s) / _FIRST_TOKEN_NOISE)
        decodes = point.load.output_tokens > 1
        ratio = predicted.per_token_s / point.measured.per_token_s if decodes else 1.0
        found.append(np.log(ratio) / _PER_TOKEN_NOISE)
    return np.array(found)
