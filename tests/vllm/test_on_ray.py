"""The real vLLM on a Ray cluster, on CPU: started by an actor, served through the head, and nothing left."""

import json
import os
import urllib.request
import uuid

import psutil
import pytest

from scepsy.deployment.on_ray import deploy_on_ray
from scepsy_optimizer.cluster import Cluster, Node
from scepsy_optimizer.plan import LLMPlan, Plan, Slot

pytestmark = pytest.mark.vllm

MARK = "SCEPSY_TEST_RAY"


@pytest.fixture
def ray_address():
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", MARK: uuid.uuid4().hex}
    import ray
    from ray.cluster_utils import Cluster as RayCluster

    made = RayCluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.add_node(num_cpus=1, labels={"scepsy-node": "n0"})
    yield made.address
    ray.shutdown()
    made.shutdown()


def engines():
    """Processes of this cluster's engines: of every vLLM the interpreter is another one than Ray's."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == os.environ[MARK] and "--served-model-name" in process.cmdline():
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_a_replica_on_ray_answers(models, vllm_command, ray_address):
    node = Node(name="n0", device_type="CPU", devices=1, memory_gib=16.0, nvlink_domains=((0,),))
    part = LLMPlan(
        llm="small",
        model=str(models["small"]),
        tensor_parallel_size=1,
        fraction=1.0,
        replicas=1,
        slots=(Slot(node="n0", devices=(0,)),),
        max_num_seqs=8,
        max_num_batched_tokens=2048,
        max_model_len=2048,
        gpu_memory_utilization=0.9,
    )
    plan = Plan(cluster=Cluster(nodes=(node,)), rate_rps=1.0, llms=(part,))
    with deploy_on_ray(
        plan, engine="vllm-cpu", command=vllm_command, address=ray_address, host="127.0.0.1"
    ) as deployment:
        body = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 7}
        request = urllib.request.Request(  # noqa: S310 - our own endpoint
            f"{deployment.url}/chat/completions",
            json.dumps(body | {"ignore_eos": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310 - as above
            assert answer.headers["x-scepsy-replica"] == "small-0"
            content = json.loads(answer.read())
        assert content["usage"]["completion_tokens"] == 7
        # What capture reads of queueing is there.
        assert content["metrics"]["queue_time_ms"] >= 0
        assert [one.phase for one in deployment.status().replicas] == ["ready"]
        assert engines()
    assert engines() == []
