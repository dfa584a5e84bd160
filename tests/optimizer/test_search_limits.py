"""What the highest rate and a refusal say where the limit is hard to see: odd domains, fixed replicas, tiny limits."""

from fractions import Fraction

import pytest
from allocations import cluster_of, group
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.planner import optimize
from scepsy_optimizer.questions import optimize_rate
from scepsy_optimizer.requirements import LLMRequirements, Requirements, WorkflowRequirements
from scepsy_optimizer.search import find_allocation, highest_rate
from scepsy_optimizer.workload import aggregate


@pytest.fixture(scope="module")
def workloads(make_execution):
    """One LLM, and two that are called at once."""
    return {
        llms: aggregate([make_execution("e", [(llm, 0, 1) for llm in llms], tokens=(800, 150))]) for llms in ("a", "ab")
    }


@pytest.fixture(scope="module")
def profiles(make_profile):
    """LLMs that leave one device little room for a KV cache: two devices carry more than twice as much."""
    return {"a": make_profile("a", weights_gib=70.0), "b": make_profile("b", weights_gib=70.0, scale=2.0)}


@settings(max_examples=15, deadline=None)
@given(llms=st.sampled_from(["a", "ab"]), domains=st.lists(st.sampled_from([1, 2, 3, 5]), min_size=2, max_size=5))
@example(llms="a", domains=[1, 2, 3, 1, 3])
@example(llms="ab", domains=[3, 3, 2, 3, 3])
def test_the_highest_rate_on_odd_domains_is_carried_and_no_higher_one(workloads, profiles, llms, domains):
    """The fewest devices may be pairs of which the domains do not hold as many: then more single ones pack."""
    workload, cluster = workloads[llms], cluster_of(domains)
    rate, _ = highest_rate(workload, profiles, cluster)
    plan = optimize(workload, profiles, cluster, rate_rps=rate)
    assert plan.prediction is not None
    assert plan.prediction.max_rate_rps >= rate * (1 - 1e-6)
    with pytest.raises(ScepsyError, match="out of reach"):
        optimize(workload, profiles, cluster, rate_rps=rate * 1.01)
    # A refusal above the highest rate could repeat its mistake: the search itself must find nothing there either.
    for factor in (1.01, 1.03, 1.06, 1.1):
        assert find_allocation(workload, profiles, cluster, rate_rps=rate * factor) is None


def test_the_highest_rate_beside_fixed_replicas_is_of_what_fits_into_their_gaps(make_profile, workloads):
    """Eight replicas of 0.7 leave three tenths of each device: small replicas, however many, and no whole device."""
    profiles = {"a": make_profile("a", weights_gib=18.0), "b": make_profile("b", scale=0.2)}
    cluster, fixed = parse_cluster("8xH100"), LLMRequirements(fixed=(group(1, Fraction(7, 10), 8),))
    asked = {"requirements": Requirements(llms={"b": fixed})}
    rate, bottleneck = highest_rate(workloads["ab"], profiles, cluster, **asked)
    assert bottleneck == "a"
    optimize(workloads["ab"], profiles, cluster, rate_rps=rate, **asked)
    for factor in (1.01, 1.1, 1.3):
        assert find_allocation(workloads["ab"], profiles, cluster, rate_rps=rate * factor, **asked) is None


@pytest.mark.parametrize("limit_s", [0.01, 1e-5, 1e-9, 1e-300])
def test_a_latency_limit_is_out_of_reach_however_small_it_is(workloads, profiles, limit_s):
    limited = Requirements(workflows={"w": WorkflowRequirements(latency_limit_s=limit_s)})
    where = f"a mean latency of {limit_s:g} s of workflow 'w' is out of reach"
    cluster = parse_cluster("4xH100")
    with pytest.raises(ScepsyError, match=rf"^{where} at 1 executions/s on 4 H100: the least is [\d.]+ s. Allow more"):
        optimize(workloads["ab"], profiles, cluster, rate_rps=1.0, requirements=limited)
    with pytest.raises(
        ScepsyError, match=rf"^{where} on 4 H100, even without load: the least is [\d.]+ s. Allow"
    ) as no:
        optimize_rate(workloads["ab"], profiles, cluster, requirements=limited)
    assert "lower rate" not in str(no.value)
