"""What is rendered is what Kubernetes takes, and what the plan says."""

import json
from dataclasses import replace

import kubernetes_validate
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from scepsy.cli import main
from scepsy.deployment.endpoint import read_config
from scepsy.deployment.on_kubernetes.manifests import as_yaml, render
from scepsy.deployment.on_kubernetes.options import KubernetesOptions, label_value, object_name
from scepsy.files import load_plan, save_plan
from scepsy_optimizer.errors import ScepsyError

VERSION = "1.34"
WAYS = (
    {"mode": "agent"},
    {"sharing": "hami"},
    {"sharing": "dra"},
    {"sharing": "mig"},
    {"sharing": "dra", "secret": "tokens", "cache_claim": "models", "namespace": "serving"},
)


def by_kind(manifests, kind):
    return {one["metadata"]["name"]: one for one in manifests if one["kind"] == kind}


def container(deployment):
    (only,) = deployment["spec"]["template"]["spec"]["containers"]
    return only


@pytest.mark.parametrize("uuids", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(way.values()))
def test_kubernetes_takes_every_object(make_plan, options, way, uuids):
    chosen = options(**way)
    manifests = list(yaml.safe_load_all(as_yaml(render(make_plan(uuids=uuids), chosen))))
    for one in manifests:
        kubernetes_validate.validate(one, VERSION, strict=True)
        assert one["metadata"]["namespace"] == chosen.namespace
        assert one["metadata"]["labels"]["scepsy.io/deployment"] == "agents"
    names = [(one["kind"], one["metadata"]["name"]) for one in manifests]
    assert len(set(names)) == len(names)
    # Every selector finds the pods of exactly one Deployment.
    pods = [one["spec"]["template"]["metadata"]["labels"] for one in manifests if one["kind"] == "Deployment"]
    for one in by_kind(manifests, "Service").values():
        assert sum(one["spec"]["selector"].items() <= labels.items() for labels in pods) == 1


def test_the_checker_would_see_a_mistake(make_plan, options):
    broken = render(make_plan(), options(mode="agent"))[1]
    broken["spec"]["replicaCount"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="replicaCount"):
        kubernetes_validate.validate(broken, VERSION, strict=True)


def test_each_replica_sits_where_the_plan_has_it(make_plan, options):
    engines = by_kind(render(make_plan(), options(sharing="hami")), "Deployment")
    endpoint = engines.pop("agents")
    assert len(engines) == 5
    found = {}
    for one in engines.values():
        terms = one["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
        (term,) = terms["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        argv = container(one)["command"]
        size = argv[argv.index("--tensor-parallel-size") + 1]
        llm = argv[argv.index("--served-model-name") + 1]
        key = (llm, term["matchExpressions"][0]["values"][0])
        found[key] = (size, container(one)["resources"]["limits"])
    assert found == {
        ("Planner/70B", "gpu-a"): ("2", {"nvidia.com/gpu": "2"}),
        ("writer", "gpu-a"): ("1", {"nvidia.com/gpu": "1"}),
        ("writer", "gpu-b"): ("1", {"nvidia.com/gpu": "1"}),
        ("judge", "gpu-b"): (
            "1",
            {"nvidia.com/gpu": "1", "nvidia.com/gpucores": "30", "nvidia.com/gpumem-percentage": "30"},
        ),
        ("ranker", "gpu-b"): (
            "1",
            {"nvidia.com/gpu": "1", "nvidia.com/gpucores": "50", "nvidia.com/gpumem-percentage": "50"},
        ),
    }
    assert "resources" not in container(endpoint)
    for one in engines.values():
        pod = one["spec"]["template"]["spec"]
        engine = container(one)
        wait_s = int(engine["lifecycle"]["preStop"]["exec"]["command"][1])
        ends_s = int(engine["command"][engine["command"].index("--shutdown-timeout") + 1])
        assert pod["terminationGracePeriodSeconds"] > wait_s + ends_s
        assert one["spec"]["strategy"] == {"type": "Recreate"}


def test_fractions_of_one_gpu_share_one_claim(make_plan, options):
    manifests = render(make_plan(uuids=True), options(sharing="dra"))
    (claim,) = by_kind(manifests, "ResourceClaim").values()
    (request,) = claim["spec"]["devices"]["requests"]
    assert request["exactly"]["selectors"][0]["cel"]["expression"].endswith('uuid == "GPU-gpu-b-1"')
    users = [
        container(one)["env"]
        for one in by_kind(manifests, "Deployment").values()
        if [{"name": "gpu-0", "resourceClaimName": claim["metadata"]["name"]}]
        == one["spec"]["template"]["spec"].get("resourceClaims")
    ]
    assert sorted(env[0]["value"] for env in users) == ["30", "50"]


def test_hami_is_told_the_gpu_where_it_is_known(make_plan, options):
    engines = by_kind(render(make_plan(uuids=True), options(sharing="hami")), "Deployment")
    told = [one["spec"]["template"]["metadata"].get("annotations") for one in engines.values()]
    assert told.count({"nvidia.com/use-gpuuuid": "GPU-gpu-b-1"}) == 2


def test_an_agent_gets_its_nodes_part_of_the_plan(make_plan, options, tmp_path):
    manifests = render(make_plan(), options(mode="agent"))
    maps = by_kind(manifests, "ConfigMap")
    agents = by_kind(manifests, "Deployment")
    assert set(agents) == {"agents", "agents-agent-gpu-a", "agents-agent-gpu-b"}
    agent = container(agents["agents-agent-gpu-a"])
    assert agent["resources"] == {"limits": {"nvidia.com/gpu": "4"}}
    # An engine that is started again for minutes may not take the others on its node along.
    paths = [agent[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "readiness", "liveness")]
    assert paths == ["/health", "/scepsy/status", "/scepsy/status"]
    drain_s = float(agent["command"][agent["command"].index("--drain") + 1])
    assert drain_s + 10 < agents["agents-agent-gpu-a"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    file = tmp_path / "plan.yaml"
    file.write_text(maps["agents-agent-gpu-b"]["data"]["plan.yaml"])
    own = load_plan(file)
    assert [node.name for node in own.cluster.nodes] == ["gpu-b"]
    assert {part.llm: part.slots for part in own.llms} == {
        part.llm: tuple(slot for slot in part.slots if slot.node == "gpu-b") for part in make_plan().llms[1:]
    }


def test_pods_start_anew_where_their_configuration_has_changed(make_plan, options):
    def annotations(plan):
        pods = by_kind(render(plan, options(mode="agent")), "Deployment")
        return {name: one["spec"]["template"]["metadata"]["annotations"] for name, one in pods.items()}

    plan = make_plan()
    before = annotations(plan)
    assert annotations(plan) == before
    # Only the second node has a judge; the endpoint knows all replicas and what each carries.
    changed = replace(
        plan, llms=tuple(replace(part, replica_rps=5.0) if part.llm == "judge" else part for part in plan.llms)
    )
    after = annotations(changed)
    assert {name for name in before if after[name] != before[name]} == {"agents", "agents-agent-gpu-b"}


@pytest.mark.parametrize("way", [{"mode": "agent"}, {"sharing": "hami"}])
def test_the_endpoint_knows_every_replica_by_an_address_that_is_there(make_plan, options, way, tmp_path):
    manifests = render(make_plan(), options(namespace="serving", **way))
    file = tmp_path / "endpoint.json"
    file.write_text(by_kind(manifests, "ConfigMap")["agents"]["data"]["endpoint.json"])
    backends = read_config(file).backends
    services = {f"http://{name}.serving.svc:8000" for name in by_kind(manifests, "Service")} - {
        "http://agents.serving.svc:8000"
    }
    assert {one.url for one in backends} == services
    assert {one.llm for one in backends} == {"Planner/70B", "writer", "judge", "ranker"}
    weights = {llm: sum(one.weight for one in backends if one.llm == llm) for llm in ("Planner/70B", "judge")}
    assert weights == {"Planner/70B": 2.0, "judge": 0.3}


@pytest.mark.parametrize(
    ("fractions", "sharing", "message"),
    [
        ((0.3,), None, r"say by what that is held \(--sharing dra, hami, mig or slices\)"),
        ((0.3, 0.5), "slices", "has fractions of 0.3, 0.5: the device plugin's slices are all one nth"),
        ((0.4,), "slices", "has fractions of 0.4"),
        ((0.9,), "mig", None),
    ],
)
def test_what_a_mechanism_cannot_hold_is_refused(make_plan, options, fractions, sharing, message):
    parts = [make_plan.part(f"m{f}", ("gpu-b", (number,)), fraction=f) for number, f in enumerate(fractions)]
    plan = make_plan(*parts)
    if message is None:
        (engine,) = [
            one for name, one in by_kind(render(plan, options(sharing=sharing)), "Deployment").items() if "m0" in name
        ]
        assert container(engine)["resources"]["limits"] == {"nvidia.com/mig-7g.80gb": "1"}
        return
    with pytest.raises(ScepsyError, match=message):
        render(plan, options(sharing=sharing))


def test_equal_slices_are_taken_from_the_device_plugin(make_plan, options):
    halves = make_plan(make_plan.part("m", ("gpu-b", (1,)), ("gpu-b", (1,)), fraction=0.5))
    engines = by_kind(render(halves, options(sharing="slices")), "Deployment")
    engines.pop("agents")
    for one in engines.values():
        assert container(one)["resources"]["limits"] == {"nvidia.com/gpu.shared": "1"}
        argv = container(one)["command"]
        assert argv[argv.index("--gpu-memory-utilization") + 1] == "0.45"


@given(st.text(min_size=1, max_size=80), st.text(min_size=1, max_size=80))
def test_names_are_names_and_stay_apart(one, other):
    options = KubernetesOptions(image="i")
    names = [object_name(options, text) for text in (one, other)]
    labels = [label_value(text) for text in (one, other)]
    for name in names:
        assert len(name) <= 52
        assert name.isascii()
        assert all(letter.isalnum() or letter == "-" for letter in name)
        assert name[0].isalnum()
        assert name[-1].isalnum()
        assert name == name.lower()
    assert (names[0] == names[1]) == (one == other)
    assert all(len(label) <= 63 for label in labels)
    assert (labels[0] == labels[1]) == (one == other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "Agents"}, "name 'Agents': Kubernetes takes lower-case letters"),
        ({"namespace": "a_b"}, "namespace 'a_b'"),
        ({"image": ""}, r"needs an image with vLLM and scepsy \(--image\)"),
    ],
)
def test_options_that_cannot_be(make_plan, options, changes, message):
    with pytest.raises(ScepsyError, match=message):
        render(make_plan(), options(**{"sharing": "hami", **changes}))


def test_a_plan_for_cores_is_refused(make_plan, options):
    plan = make_plan()
    nodes = tuple(replace(node, device_type="CPU") for node in plan.cluster.nodes)
    with pytest.raises(ScepsyError, match="node 'gpu-a' has no GPUs"):
        render(replace(plan, cluster=replace(plan.cluster, nodes=nodes)), options(sharing="hami"))


def test_a_plan_for_mig_instances_is_refused(make_plan, options):
    plan = make_plan()
    nodes = tuple(replace(node, device_type="H100_MIG_1G_10GB") for node in plan.cluster.nodes)
    with pytest.raises(ScepsyError, match="stands for MIG instances that are there already"):
        render(replace(plan, cluster=replace(plan.cluster, nodes=nodes)), options(mode="agent"))


def test_agents_answer_without_the_endpoints_key(make_plan, options):
    pods = by_kind(render(make_plan(), options(**{**WAYS[-1], "mode": "agent"})), "Deployment")
    envs = {name: container(one).get("env", []) for name, one in pods.items()}
    assert envs.pop("agents") == []
    assert len(envs) == 2
    assert all({"name": "SCEPSY_API_KEY", "value": ""} in env for env in envs.values())


def test_the_command_prints_what_kubectl_takes(make_plan, tmp_path, capsys):
    save_plan(make_plan(), tmp_path / "plan.yaml")
    words = ["deploy", str(tmp_path / "plan.yaml"), "--to", "kubernetes", "--image", "i:1"]
    assert main([*words, "--mode", "agent"]) == 0
    printed = capsys.readouterr().out
    assert {one["kind"] for one in yaml.safe_load_all(printed)} == {"ConfigMap", "Deployment", "Service"}
    assert main(words) == 2
    assert "--sharing" in capsys.readouterr().err
    assert main([*words, "--mode", "agent", "--engine", "emulator", "--command", "python", "--port", "8001"]) == 2
    assert "--engine, --command, --port: not with --to kubernetes" in capsys.readouterr().err


def test_a_configuration_that_is_none(tmp_path):
    file = tmp_path / "endpoint.json"
    with pytest.raises(ScepsyError, match="No such file"):
        read_config(file)
    for text, message in (("{", "Invalid JSON"), ('{"backends": []}', "there are no backends")):
        file.write_text(text)
        with pytest.raises(ScepsyError, match=message):
            read_config(file)
    file.write_text(json.dumps({"backends": [{"id": "a"}]}))
    with pytest.raises(ScepsyError, match=r"backends.0.llm: Field required"):
        read_config(file)


def test_a_plan_that_gives_a_device_out_twice_is_refused(make_plan, options):
    plan = make_plan(make_plan.part("writer", ("gpu-a", (2,)), ("gpu-a", (2,))))
    with pytest.raises(ScepsyError, match="device 2 of 'gpu-a' is given out 2 times, to 'writer'"):
        render(plan, options(sharing="hami"))
