"""Plans judged by replay: percentiles of one, and which of a few that the closed form finds nearly equal is best."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from scepsy_optimizer.plan import Plan
from scepsy_optimizer.profile import Profiles
from scepsy_optimizer.steady_state import replay_steady_state, replayed_calls
from scepsy_optimizer.workload import Workload

MAX_REPLAYED = 6
_MAX_REPLAYED_CALLS = 400_000
"""Of all replays of one comparison together: that takes some twenty seconds."""


def with_replay(plan: Plan, profiles: Profiles, workload: Workload, seed: int) -> Plan:
    """The plan with what a replay of it gives; the plan itself where that takes too long."""
    replayed = replay_steady_state(plan, profiles, workload, rng=np.random.default_rng(seed))
    if replayed is None or plan.prediction is None:
        return plan
    return replace(plan, prediction=replace(plan.prediction, replayed=replayed))


def least_replayed(plans: Sequence[Plan], profiles: Profiles, workload: Workload, seed: int) -> Plan:
    """The plan of least replayed mean latency, `plans` being of one rate, best first; of many only the first few count.

    All meet the same executions at the same moments, so that chance moves them alike: what is left of it is a third of
    a per cent, where replays of different arrivals are some per cent apart. The first where a replay takes too long.
    """
    calls = replayed_calls(plans[0], workload)
    kept = plans[: max(1, int(_MAX_REPLAYED_CALLS / calls))] if calls else plans[:1]
    if len(kept) == 1:
        return kept[0]
    longest_s = max(plan.prediction.latency_s for plan in kept if plan.prediction is not None)
    found = [
        replay_steady_state(plan, profiles, workload, rng=np.random.default_rng(seed), settling_s=longest_s)
        for plan in kept
    ]
    means_s = [one.mean_s for one in found if one is not None]
    return kept[means_s.index(min(means_s))] if len(means_s) == len(kept) else kept[0]
