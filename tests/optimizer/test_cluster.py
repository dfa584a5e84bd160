"""What is near to what in a cluster, and the shapes it is given as."""

from dataclasses import replace

import networkx as nx
import pytest

from scepsy_optimizer.cluster import Cluster, Node, parse_cluster, topology
from scepsy_optimizer.errors import ScepsyError


def test_the_topology_orders_the_links():
    cluster = Cluster(
        nodes=tuple(
            Node(
                name=f"n{index}",
                device_type="H100",
                devices=4,
                memory_gib=80,
                nvlink_domains=((0, 1), (2, 3)),
                pcie_domains=((0, 1, 2), (3,)),
                switch="xxy"[index],
            )
            for index in range(3)
        )
    )
    graph = topology(cluster)

    def distance(one, other):
        return nx.shortest_path_length(graph, ("device", *one), ("device", *other), weight="distance")

    assert distance(("n0", 0), ("n0", 1)) == 1
    assert distance(("n0", 0), ("n0", 2)) == 2
    assert distance(("n0", 0), ("n1", 3)) == 16
    assert distance(("n0", 0), ("n2", 0)) == 32
    # Over the NVLink of 2 and 3, which is shorter than across the sockets.
    assert distance(("n0", 0), ("n0", 3)) == 3
    assert (
        nx.shortest_path_length(topology(parse_cluster("2xL40S")), ("device", "node0", 0), ("device", "node0", 1)) == 2
    )


def test_clusters_of_several_shapes():
    cluster = parse_cluster("2x8xH100+4xl40s")
    assert [(node.name, node.device_type, node.devices) for node in cluster.nodes] == [
        ("node0", "H100", 8),
        ("node1", "H100", 8),
        ("node2", "L40S", 4),
    ]
    assert cluster.device_types == ("H100", "L40S")
    with pytest.raises(ScepsyError, match=r"several joined by \+"):
        parse_cluster("8xH100+")
    node = cluster.nodes[0]
    with pytest.raises(ScepsyError, match="H100 has 79.6 GiB on one node and 40 GiB on 'x'"):
        Cluster(nodes=(node, replace(node, name="x", memory_gib=40)))
    with pytest.raises(ScepsyError, match="pcie_domains must name each of its 8 devices once"):
        replace(node, pcie_domains=((0, 1),))
    with pytest.raises(ScepsyError, match="node 'node0': has 0 devices; give at least 1"):
        replace(node, devices=0, nvlink_domains=())
    with pytest.raises(ScepsyError, match="cluster: has no nodes; name at least one"):
        Cluster(nodes=())
