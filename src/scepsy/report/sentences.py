"""What a plan is predicted to give, in sentences."""

from __future__ import annotations

from typing import Final

from scepsy_optimizer.plan import Plan, Prediction

_PROVEN: Final = 5e-4
"""A gap that only the search's precision leaves."""
_WHOLE: Final = 1e-6


def describe_plan(plan: Plan) -> list[str]:
    """The bottleneck, where the time goes, the percentiles of a replay, the bound: each as one sentence."""
    prediction = plan.prediction
    if prediction is None:
        return ["This plan was written without a prediction: nothing is known of its latency and load."]
    told = [_bottleneck_words(plan, prediction)]
    if prediction.llm_latency_s and prediction.latency_s > 0:
        llm, most_s = max(prediction.llm_latency_s.items(), key=lambda item: item[1])
        told.append(
            f"Of the {prediction.latency_s:.3g} s that a mean execution takes, {most_s:.3g} s "
            f"({_percent(most_s / prediction.latency_s)}) are waiting for {llm}: a faster {llm} would help most."
        )
    if prediction.replayed is not None:
        replayed = prediction.replayed
        told.append(
            f"Replayed event by event with {replayed.executions:,} traced executions: {replayed.mean_s:.3g} s in the "
            f"mean; half of them end within {replayed.p50_s:.3g} s, 95 of 100 within {replayed.p95_s:.3g} s, 99 of 100 "
            f"within {replayed.p99_s:.3g} s."
        )
    if prediction.lower_bound_s > 0:
        told.append(_bound_words(plan, prediction))
    return told


def _bottleneck_words(plan: Plan, prediction: Prediction) -> str:
    words = (
        f"The bottleneck is {prediction.bottleneck}: at {prediction.max_rate_rps:.3g} executions/s its replicas reach "
        "the highest load that is planned for"
    )
    if prediction.max_rate_rps > 0 and plan.rate_rps > 0:
        words += (
            f"; the {plan.rate_rps:.3g}/s of this plan are {_percent(plan.rate_rps / prediction.max_rate_rps)} of that"
        )
    return f"{words}."


def _bound_words(plan: Plan, prediction: Prediction) -> str:
    # A plan of the fewest devices has the bound of so many.
    taken = sum(part.device_count for part in plan.llms)
    where = "on this cluster" if taken > plan.cluster.devices - _WHOLE else "of as many devices"
    weighed = " with the workflows' weights" if prediction.objective_s is not None else ""
    if prediction.gap <= _PROVEN:
        return (
            f"No allocation {where} has a lower mean latency{weighed}, by the same model: the search has "
            "looked at all of them or ruled them out."
        )
    return (
        f"No allocation {where} can have a mean latency under {prediction.lower_bound_s:.3g} s{weighed}, by "
        f"the same model: at most {_percent(prediction.gap)} less than that of this plan."
    )


def _percent(part: float) -> str:
    return f"{100 * part:.{0 if part >= 0.0995 else 1}f} %"
