import os
import uuid

import pytest

MARK = "SCEPSY_TEST_RAY"


@pytest.fixture(scope="session")
def cluster():
    """A head and three nodes of four pretended GPUs each, which a label names."""
    # Set before Ray is imported: its processes inherit them, and nobody is told anything.
    os.environ |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    os.environ[MARK] = uuid.uuid4().hex
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "num_gpus": 0, "include_dashboard": False})
    for number in range(3):
        made.add_node(num_cpus=2, num_gpus=4, labels={"scepsy-node": f"n{number}"}, wait=False)
    made.wait_for_nodes()
    yield made
    import ray

    ray.shutdown()
    made.shutdown()
