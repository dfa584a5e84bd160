import pytest
from hypothesis import given
from hypothesis import strategies as st

from scepsy_optimizer.cluster import Cluster, Node, parse_cluster
from scepsy_optimizer.placement import check_placement
from scepsy_optimizer.planner import optimize
from scepsy_optimizer.requirements import Requirements, check_requirements, kept
from scepsy_optimizer.search import highest_rate
from scepsy_optimizer.what_if import add_device, remove_device, what_if
from scepsy_optimizer.workload import aggregate


@pytest.fixture(scope="module")
def workload(make_execution):
    runs = [make_execution(f"e{n}", [("a", 0, 2 + n % 3), ("a", 0, 3), ("b", 5, 7)]) for n in range(10)]
    return aggregate(runs)


@pytest.fixture(scope="module")
def profiles(make_profile):
    return {"a": make_profile("a"), "b": make_profile("b", scale=0.5, weights_gib=4.0)}


def test_one_device_more_is_never_worse_and_one_less_never_better(workload, profiles):
    plan = optimize(workload, profiles, parse_cluster("3xH100"), rate_rps=4.0)
    now, more, less = what_if(workload, profiles, plan)
    assert (now.change, more.change, less.change) == (0, 1, -1)
    assert now.plan == plan
    assert more.plan is not None
    assert less.plan is not None
    assert (more.plan.cluster.devices, less.plan.cluster.devices) == (4, 2)
    assert less.highest_rate_rps < now.highest_rate_rps < more.highest_rate_rps
    for one in (now, more, less):
        assert one.plan is not None
        assert one.highest_rate_rps == highest_rate(workload, profiles, one.plan.cluster)[0]
        assert check_placement(one.plan) == []
        assert one.plan.rate_rps == plan.rate_rps
    latencies = [one.plan.prediction.latency_s for one in (more, now, less)]
    assert latencies == sorted(latencies)


def test_what_a_device_less_cannot_do_is_told(workload, profiles):
    cluster = parse_cluster("2xH100")
    rate, _ = highest_rate(workload, profiles, cluster)
    plan = optimize(workload, profiles, cluster, rate_rps=rate * 0.9)
    less = what_if(workload, profiles, plan)[-1]
    assert less.plan is None
    assert "is out of reach on 1 H100: the highest is" in less.reason
    assert 0 < less.highest_rate_rps < plan.rate_rps
    single = optimize(workload, profiles, parse_cluster("1xH100"), rate_rps=0.1)
    assert [one.change for one in what_if(workload, profiles, single)] == [0, 1]


def test_requirements_hold_there_too(workload, profiles):
    plan = optimize(workload, profiles, parse_cluster("3xH100"), rate_rps=2.0)
    requirements = Requirements(llms={"a": kept(plan, "a")})
    for one in what_if(workload, profiles, plan, requirements=requirements):
        if one.plan is not None:
            assert check_requirements(one.plan, requirements) == []


def halves(devices):
    """Two sockets, as NVML tells them."""
    first = range(-(-devices // 2))
    second = range(len(first), devices)
    return tuple(tuple(part) for part in (first, second) if part)


@given(st.lists(st.tuples(st.sampled_from(["8xH100", "2x3xH100", "1xH100", "4xL40S"])), min_size=1, max_size=3))
def test_clusters_change_by_one_device(shapes):
    nodes = tuple(
        Node(
            name=f"n{index}-{node.name}",
            device_type=node.device_type,
            devices=node.devices,
            memory_gib=node.memory_gib,
            nvlink_domains=node.nvlink_domains,
            uuids=tuple(f"GPU-{index}-{node.name}-{device}" for device in range(node.devices)),
            pcie_domains=halves(node.devices) if index else (),
        )
        for index, (shape,) in enumerate(shapes)
        for node in parse_cluster(shape).nodes
    )
    cluster = Cluster(nodes=nodes)
    for device_type in cluster.device_types:
        more = add_device(cluster, device_type)
        assert more.devices == cluster.devices + 1
        assert more.devices_of(device_type) == cluster.devices_of(device_type) + 1
        assert more.largest_domain <= max(8, cluster.largest_domain)
        less = remove_device(cluster, device_type)
        if cluster.devices == 1:
            assert less is None
            continue
        assert less is not None
        assert less.devices_of(device_type) == cluster.devices_of(device_type) - 1
        kept_uuids = {uuid for node in less.nodes for uuid in node.uuids}
        assert kept_uuids < {uuid for node in cluster.nodes for uuid in node.uuids}
        assert len(kept_uuids) == less.devices
