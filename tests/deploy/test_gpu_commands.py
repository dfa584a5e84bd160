"""The path for GPUs where there are none: every command line and environment that plans lead to, as recorded.

`gpu_commands.txt` is to be read: what a change of the code does to it is what the change does to engines on GPUs. Its
options are held against the real vLLM's own parser in tests/vllm. To record it anew:
RECORD=1 python -m pytest tests/deploy/test_gpu_commands.py
"""

import os
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from scepsy.deployment import machine
from scepsy.deployment.prepare import prepare
from scepsy_optimizer.cluster import Cluster, Node
from scepsy_optimizer.errors import ScepsyError

RECORDED = Path(__file__).with_name("gpu_commands.txt")
WHOLE = Node(
    name="host-H100",
    device_type="H100",
    devices=4,
    memory_gib=79.6,
    nvlink_domains=((0, 1, 2, 3),),
    uuids=("GPU-0", "GPU-1", "GPU-2", "GPU-3"),
)
CUT = Node(
    name="host-H100_MIG_3G_40GB",
    device_type="H100_MIG_3G_40GB",
    devices=2,
    memory_gib=39.5,
    nvlink_domains=((0,), (1,)),
    uuids=("MIG-a", "MIG-b"),
)


@pytest.fixture
def ready(monkeypatch, tmp_path, make_part, make_plan):
    """A machine with two sockets, as its tools would show it, and what is prepared for a plan there."""
    gpus = [
        *(
            machine.Gpu(uuid=f"GPU-{n}", name="NVIDIA H100 80GB HBM3", cores=(0, 1) if n < 2 else (2, 3))
            for n in range(4)
        ),
        *(machine.Gpu(uuid=f"MIG-{n}", name="NVIDIA H100 80GB HBM3 MIG 3g.40gb", cores=(2, 3)) for n in "ab"),
    ]
    monkeypatch.setattr(machine, "find_gpus", lambda: gpus)
    monkeypatch.setattr(machine, "running_mps", lambda: "/run/mps")
    monkeypatch.setattr("scepsy.deployment.prepare.shutil.which", lambda word: f"/usr/bin/{word}")
    monkeypatch.setattr("scepsy.deployment.processes.free_ports", lambda count: list(range(18000, 18000 + count)))

    def make(*parts, nodes, **options):
        plan = replace(make_plan(*parts), cluster=Cluster(nodes=nodes))
        remarks = []
        specs, _ = prepare(
            plan,
            "vllm",
            **{"profiles": {}, "directory": tmp_path, "command": None, "engine_args": (), "seed": 0, **options},
            on_event=remarks.append,
        )
        assert remarks == []
        return specs

    return make


def shown(title, specs):
    lines = [f"# {title}"]
    for spec in specs:
        lines += [f"{spec.id} on {spec.place}:", *(f"  {key}={value}" for key, value in sorted(spec.env.items()))]
        lines += [f"  {shlex.join(spec.argv)}", ""]
    return "\n".join(lines)


def test_command_lines_and_environments_are_as_recorded(ready, make_part, make_profile):
    on = {"node": WHOLE.name}
    whole = ready(
        make_part("Org/big", (0, 1), **on),
        make_part("mid", 2, **on, max_num_seqs=256),
        nodes=(WHOLE,),
    )
    shared = ready(
        make_part("half", 3, fraction=0.5, **on),
        make_part("third", 3, 3, fraction=0.2, **on),
        nodes=(WHOLE,),
        engine_args=("--dtype", "bfloat16"),
    )
    cut = ready(make_part("mid", 2, **on), make_part("small", 0, 1, node=CUT.name), nodes=(WHOLE, CUT))
    exact = ready(
        make_part("m", 3, fraction=0.5, **on),
        nodes=(WHOLE,),
        profiles={"m": make_profile("m")},
        kv_cache_bytes=True,
        otlp_endpoint="http://127.0.0.1:4318/v1/traces",
        command=("/opt/python", "-m", "vllm.entrypoints.openai.api_server"),
    )
    text = "\n".join(
        (
            shown("whole GPUs: tensor parallelism 2 beside 1, each engine on the cores of its socket", whole),
            shown("fractions of one GPU under MPS, an argument added to each engine", shared),
            shown("a GPU and the MIG instances of another", cut),
            shown("a KV cache in bytes, spans by HTTP, started as a module", exact),
        )
    )
    if os.environ.get("RECORD"):
        RECORDED.write_text(text)
    assert text == RECORDED.read_text()


def test_a_kv_cache_in_bytes_is_what_the_profile_counts_on(ready, make_part, make_profile):
    profile = make_profile("m")
    specs = ready(
        make_part("m", 3, 3, fraction=0.5, node=WHOLE.name),
        nodes=(WHOLE,),
        profiles={"m": profile},
        kv_cache_bytes=True,
    )
    for spec in specs:
        size = int(spec.argv[spec.argv.index("--kv-cache-memory-bytes") + 1])
        assert size == profile.kv_tokens(1, 0.5) * 100_000
        assert "--gpu-memory-utilization" not in spec.argv
        # Weights, what an engine takes besides, and the cache: two of them stay below what may be used of the device.
        assert 2 * (size + 3.0 * 2**30) <= 0.92 * 79.6 * 2**30
    with pytest.raises(ScepsyError, match="a KV cache in bytes needs a profile of each LLM, and there is none of x"):
        ready(make_part("x", 0, node=WHOLE.name), nodes=(WHOLE,), kv_cache_bytes=True)


def test_nodes_that_are_not_known_to_be_this_machine_are_refused(ready, make_part):
    with pytest.raises(ScepsyError, match="the plan has 2 nodes, but engine 'vllm' starts everything on this machine"):
        ready(make_part("m", 0, node=WHOLE.name), nodes=(WHOLE, replace(CUT, uuids=())))
    elsewhere = replace(CUT, uuids=("MIG-x", "MIG-y"))
    with pytest.raises(ScepsyError, match="uses GPUs that this machine does not have: MIG-y"):
        ready(make_part("m", 1, node=CUT.name), nodes=(WHOLE, elsewhere))
