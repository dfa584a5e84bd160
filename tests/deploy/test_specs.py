import re
from dataclasses import replace

import pytest

from scepsy.deployment import emulator_specs, vllm_cpu_specs, vllm_specs
from scepsy.deployment.on_ray.order import replicas_of
from scepsy_optimizer.errors import ScepsyError


def options(argv):
    """Option -> value of an argv that ends with options."""
    return dict(re.findall(r"(--[a-z-]+)(?: ([^- ]\S*))?", " ".join(argv)))


def test_vllm_on_whole_gpus(make_plan, make_part):
    plan = make_plan(make_part("Qwen/Qwen3-32B", (2, 3)), cluster="8xH100")
    (spec,) = vllm_specs(plan, ports=[9001])
    assert spec.argv == (
        *("vllm", "serve", "models/Qwen/Qwen3-32B"),
        *("--served-model-name", "Qwen/Qwen3-32B"),
        *("--host", "127.0.0.1", "--port", "9001"),
        *("--tensor-parallel-size", "2"),
        *("--max-num-seqs", "128", "--max-num-batched-tokens", "4096", "--max-model-len", "4096"),
        *("--shutdown-timeout", "10", "--enable-per-request-metrics", "--enable-prompt-tokens-details"),
        "--disable-uvicorn-access-log",
        *("--gpu-memory-utilization", "0.9"),
    )
    assert dict(spec.env) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "2,3"}
    assert (spec.id, spec.node, spec.devices, spec.url) == (
        "Qwen-Qwen3-32B-0",
        "node0",
        (2, 3),
        "http://127.0.0.1:9001",
    )


def test_vllm_on_fractions_under_mps(make_plan, make_part):
    plan = make_plan(make_part("a", 0, 1, fraction=0.3), make_part("b", 0, fraction=0.7), cluster="2xH100")
    specs = vllm_specs(plan, ports=[1, 2, 3], gpus=["GPU-x", "GPU-y"], mps_pipe_directory="/run/mps")
    assert [spec.env["CUDA_VISIBLE_DEVICES"] for spec in specs] == ["GPU-x", "GPU-y", "GPU-x"]
    assert [spec.env["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] for spec in specs] == ["30", "30", "70"]
    assert {spec.env["CUDA_MPS_PIPE_DIRECTORY"] for spec in specs} == {"/run/mps"}
    memory = [float(options(spec.argv)["--gpu-memory-utilization"]) for spec in specs]
    assert memory == [0.27, 0.27, pytest.approx(0.63, abs=1e-4)]
    assert memory[0] + memory[2] <= 0.9
    with pytest.raises(ScepsyError, match=r"'a' takes 0\.3 of a GPU, which needs NVIDIA MPS"):
        vllm_specs(plan, ports=[1, 2, 3])


def test_the_plans_own_uuids_count_before_the_machines(make_plan, make_part):
    plan = make_plan(make_part("a", 1), cluster="2xH100")
    node = replace(plan.cluster.nodes[0], uuids=("GPU-p", "GPU-q"))
    plan = replace(plan, cluster=replace(plan.cluster, nodes=(node,)))
    (spec,) = vllm_specs(plan, ports=[1], gpus=["GPU-x", "GPU-y"])
    assert spec.env["CUDA_VISIBLE_DEVICES"] == "GPU-q"


def test_a_module_takes_the_model_as_an_option(make_plan, make_part):
    plan = make_plan(make_part("a", 0), cluster="2xH100")
    command = ["py", "-m", "vllm.entrypoints.openai.api_server"]
    (spec,) = vllm_specs(plan, ports=[1], command=command, engine_args=["--dtype", "half"])
    assert spec.argv[:5] == (*command, "--model", "models/a")
    assert spec.argv[-2:] == ("--dtype", "half")


def test_vllm_on_cores(make_plan, make_part):
    plan = make_plan(make_part("a", (0, 1)), make_part("b", 1, fraction=0.5), cluster="2xCPU")
    tp, half = vllm_cpu_specs(plan, ports=[1, 2], cores=[4, 6], kv_cache_gib=[1, 3])
    assert dict(tp.env) == {"VLLM_CPU_OMP_THREADS_BIND": "4|6", "VLLM_CPU_KVCACHE_SPACE": "1"}
    assert dict(half.env) == {
        "VLLM_CPU_KVCACHE_SPACE": "3",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
    }
    assert half.argv[:4] == ("taskset", "--cpu-list", "6", "vllm")
    assert options(half.argv)["--distributed-executor-backend"] == "uni"
    assert "taskset" not in tp.argv
    assert "--enforce-eager" in tp.argv
    assert options(tp.argv)["--tensor-parallel-size"] == "2"
    assert "--gpu-memory-utilization" not in tp.argv
    assert (tp.core_quota, half.core_quota) == (None, 0.5)


def test_nodes_of_cores_lie_one_after_another(make_plan, make_part):
    plan = make_plan(make_part("a", 1, node="node1"), cluster="2x2xCPU")
    (spec,) = vllm_cpu_specs(plan, ports=[1], cores=[0, 1, 2, 3])
    assert spec.argv[2] == "3"
    with pytest.raises(ScepsyError, match="4 CPU devices but this process may use 3 cores"):
        vllm_cpu_specs(plan, ports=[1], cores=[0, 1, 2])


def test_emulators(make_plan, make_part):
    plan = make_plan(make_part("a", 0, 1, fraction=0.5), cluster="2xH100")
    specs = emulator_specs(plan, ports=[7, 8], profile_files=["a.yaml"], seed=5)
    assert options(specs[1].argv) == {
        "--profile": "a.yaml",
        "--llm": "a",
        "--tensor-parallel-size": "1",
        "--fraction": "0.5",
        "--host": "127.0.0.1",
        "--port": "8",
        "--seed": "5",
    }
    assert [spec.place for spec in specs] == ["node0: 0.5 of 0", "node0: 0.5 of 1"]


def test_ids_differ_and_name_files(make_plan, make_part):
    plan = make_plan(make_part("a/b", 0), make_part("a b", 0), make_part("///", 0), cluster="2xH100")
    ids = [spec.id for spec in vllm_specs(plan, ports=[1, 2, 3])]
    assert ids == ["a-b-0", "a-b-1", "llm-0"]


def test_moving_to_another_port_changes_nothing_else(make_plan, make_part):
    (spec,) = vllm_specs(make_plan(make_part("a", 0), cluster="1xH100"), ports=[9001])
    moved = spec.on_port(9002)
    assert moved.argv == tuple("9002" if word == "9001" else word for word in spec.argv)
    assert moved.url.endswith(":9002")
    assert moved.on_port(9001) == spec


def test_ray_holds_no_fractions_of_cores(make_plan, make_part):
    plan = make_plan(make_part("a", 0, fraction=0.5))
    with pytest.raises(ScepsyError, match="a: a fraction of a core is not held on Ray"):
        replicas_of(plan, "vllm-cpu", {"node0": "id"}, profiles={})
    (one,) = replicas_of(plan, "vllm", {"node0": "id"}, profiles={})
    assert one.resources == {"GPU": 0.5}
