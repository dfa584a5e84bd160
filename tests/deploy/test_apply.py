"""From one plan to another while it runs: real processes, requests all the time, and failures half way."""

import json
import threading
import urllib.error
import urllib.request
from dataclasses import replace

import pytest

from scepsy.cli import main
from scepsy.deployment import deploy, find
from scepsy.deployment.apply import _alone
from scepsy.deployment.change import make_change
from scepsy.deployment.specs import vllm_specs
from scepsy.deployment.state import Order
from scepsy.files import load_plan, save_plan
from scepsy_optimizer.cluster import Cluster, parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.plan import Plan


def call(deployment, model, **options):
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, **options})
    request = urllib.request.Request(  # noqa: S310 - our own endpoint
        f"{deployment.url}/chat/completions", body.encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - as above
        return answer.headers["x-scepsy-replica"], answer.read()


def replicas(deployment):
    return {one.id: one for one in deployment.status().replicas}


def pids(deployment):
    return {one.id: one.pid for one in deployment.status().replicas}


class Caller:
    """Calls models again and again from a thread of its own each, until the block ends."""

    def __init__(self, deployment, *models):
        self._end = threading.Event()
        self.served, self.failed = 0, []
        self._threads = [threading.Thread(target=self._go, args=(deployment, model)) for model in models]

    def _go(self, deployment, model):
        while not self._end.is_set():
            try:
                call(deployment, model)
                self.served += 1
            except OSError as error:
                self.failed.append(f"{model}: {error}")

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture
def profiles(make_profile):
    return {name: make_profile(name) for name in ("gen", "ver", "new")}


def test_only_what_differs_starts_and_stops(home, make_plan, make_part, profiles):
    old = make_plan(make_part("gen", 0, 1), make_part("ver", 2, fraction=0.5), cluster="4xH100")
    new = make_plan(make_part("gen", 0), make_part("ver", 2, fraction=0.5), make_part("new", 1), cluster="4xH100")
    with deploy(old, engine="emulator", profiles=profiles) as deployment:
        before = pids(deployment)
        events = []
        deployment.apply(new, profiles=profiles, on_event=events.append)
        after = pids(deployment)
        assert set(after) == {"gen-0", "ver-0", "new-0"}
        assert {name: after[name] for name in ("gen-0", "ver-0")} == {name: before[name] for name in ("gen-0", "ver-0")}
        assert events[0] == "2 replicas stay, 1 start, 1 stop"
        assert call(deployment, "new")[0] == "new-0"
        assert load_plan(home / "deployments/default/plan.yaml") == new
        with urllib.request.urlopen(f"{deployment.url}/models") as answer:  # noqa: S310 - our own endpoint
            listed = {model["id"]: model["max_model_len"] for model in json.loads(answer.read())["data"]}
        assert listed == {part.llm: part.max_model_len for part in new.llms}
        assert sorted(listed) == ["gen", "new", "ver"]
        # And back, from another handle: "new" is not known any more.
        find().apply(old, profiles=profiles)
        assert set(pids(deployment)) == {"gen-0", "gen-1", "ver-0"}
        with pytest.raises(urllib.error.HTTPError, match="404"):
            call(deployment, "new")
        # Nothing to do is done at once.
        find().apply(old, profiles=profiles, on_event=events.append)
        assert events[-1] == "3 replicas stay, 0 start, 0 stop"


def test_no_call_is_lost_while_llms_change_places(home, make_plan, make_part, profiles):
    # Only through the free device can both go on serving.
    old = make_plan(make_part("gen", 0), make_part("ver", 1), cluster="3xH100")
    new = make_plan(make_part("gen", 1), make_part("ver", 0), cluster="3xH100")
    with deploy(old, engine="emulator", profiles=profiles) as deployment:
        long = []
        # As long as its replica may take to answer: it ends there, whatever comes after.
        streaming = threading.Thread(
            target=lambda: long.append(call(deployment, "gen", max_tokens=800, min_tokens=800, stream=True))
        )
        streaming.start()
        with Caller(deployment, "gen", "ver") as caller:
            while caller.served < 10:
                pass
            deployment.apply(new, profiles=profiles)
            served = caller.served
            while caller.served < served + 10:
                pass
        streaming.join()
        assert caller.failed == []
        assert long[0][1].count(b"data: ") >= 800
        assert {one.llm: one.place for one in deployment.status().replicas} == {"gen": "node0: 1", "ver": "node0: 0"}


def test_a_replica_that_does_not_come_up_undoes_the_change(stub, make_plan, make_part):
    wider = make_plan(make_part("a", 0), make_part("b", 1, fraction=0.5), make_part("c", 1, fraction=0.5))
    with stub() as deployment:
        before = pids(deployment)
        stub.behave("dies")
        with pytest.raises(ScepsyError, match=r"the old plan runs again(.|\n)*exit code 3(.|\n)*No available memory"):
            deployment.apply(wider)
        stub.behave("")
        after = replicas(deployment)
        assert set(after) == {"a-0", "b-0"}
        assert after["a-0"].pid == before["a-0"]
        for model in ("a", "b"):
            call(deployment, model)


def test_what_cannot_even_go_back_is_tried_further(stub, make_plan, make_part, wait):
    swapped = make_plan(make_part("a", 1), make_part("b", 0))
    with stub() as deployment:
        stub.behave("dies")
        with pytest.raises(ScepsyError, match="did not start again yet and is tried further"):
            deployment.apply(swapped)
        assert sorted(one.phase for one in deployment.status().replicas) == ["ready", "restarting"]
        stub.behave("")
        wait(lambda: all(one.phase == "ready" for one in deployment.status().replicas), 30)
        for model in ("a", "b"):
            call(deployment, model)
        # What failed can be asked for again.
        deployment.apply(swapped)
        assert {one.llm: one.place for one in deployment.status().replicas} == {"a": "node0: 1", "b": "node0: 0"}


def test_one_change_at_a_time_and_an_end_in_the_middle(stub, make_plan, make_part, wait):
    deployment = stub()
    stub.behave("hangs")
    errors = []

    def change():
        try:
            deployment.apply(make_plan(make_part("a", 1), make_part("b", 0)))
        except ScepsyError as error:
            errors.append(str(error))

    changing = threading.Thread(target=change)
    changing.start()
    try:
        wait(lambda: any(one.phase == "starting" for one in deployment.status().replicas))
        with pytest.raises(ScepsyError, match="is being changed already"):
            find().apply(make_plan(make_part("a", 0)))
    finally:
        deployment.stop()
        changing.join()
    assert len(errors) == 1
    assert "broke off" in errors[0] or "ended while it was being changed" in errors[0]


def test_a_change_that_nobody_follows_any_more_is_still_under_way(tmp_path):
    (tmp_path / "changes" / "1").mkdir(parents=True)
    (tmp_path / "changes" / "1" / "change.json").write_text("{}")
    (tmp_path / "changes" / "1" / "events.jsonl").write_text('{"event": "gen: start"}\n')
    with pytest.raises(ScepsyError, match="being changed already"), _alone(tmp_path):
        pass
    (tmp_path / "changes" / "1" / "events.jsonl").write_text('{"event": "gen: start"}\n{"done": true}\n')
    with _alone(tmp_path):
        pass


def test_the_command_says_what_it_would_do_and_does_it(stub, make_plan, make_part, tmp_path, capsys):
    save_plan(make_plan(make_part("a", 0)), tmp_path / "new.yaml")
    with stub() as deployment:
        assert main(["apply", str(tmp_path / "new.yaml"), "--dry-run"]) == 0
        assert "b: stop tensor_parallel_size 1 on node0: 1" in capsys.readouterr().out
        assert len(replicas(deployment)) == 2
        assert main(["apply", str(tmp_path / "new.yaml")]) == 0
        assert "1 replicas stay, 0 start, 1 stop" in capsys.readouterr().out
        assert set(replicas(deployment)) == {"a-0"}
    assert main(["apply", str(tmp_path / "new.yaml")]) == 2
    assert "no deployment 'default' is running" in capsys.readouterr().err


def test_a_change_on_gpus_is_told_in_the_new_clusters_words(make_plan, make_part):
    old = make_plan(make_part("a", 0), make_part("b", (1, 2)), cluster="4xH100")
    new = make_plan(make_part("a", 0, 3), make_part("b", (1, 2), max_num_seqs=64), cluster="4xH100")
    gpus = [f"GPU-{number}" for number in range(4)]
    specs = vllm_specs(old, ports=(1, 2), gpus=gpus)
    order = Order(
        name="x", engine="vllm", host="", port=0, specs=specs, start_timeout_s=1, grace_s=1, drain_s=1, seed=3
    )
    change = make_change(old, new, order, lambda plan: vllm_specs(plan, ports=(7,), gpus=gpus)[0], drain_s=9)
    assert [(step.action, step.spec.id) for step in change.steps] == [
        ("start", "a-1"),
        ("stop", "b-0"),
        ("start", "b-1"),
    ]
    started = change.steps[0].spec
    assert started.env["CUDA_VISIBLE_DEVICES"] == "GPU-3"
    assert change.steps[2].spec.argv[change.steps[2].spec.argv.index("--max-num-seqs") + 1] == "64"
    assert [spec.id for spec in change.after.specs] == ["a-0", "a-1", "b-1"]
    assert (change.after.seed, change.drain_s) == (3, 9)


def test_a_replica_weighs_what_its_type_of_device_carries(make_plan, make_part):
    named = {"slow": "1xA100", "fast": "2xH100"}
    cluster = Cluster(nodes=tuple(replace(parse_cluster(named[name]).nodes[0], name=name) for name in named))
    before = make_part("a", 0, node="slow", device_type="A100", replica_rps=1.0)
    old = Plan(cluster=cluster, rate_rps=1.0, llms=(before,))
    new = replace(old, llms=(before, make_part("a", 0, 1, node="fast", device_type="H100", replica_rps=3.0)))
    gpus = ["GPU-0", "GPU-1"]
    order = Order(
        name="x",
        engine="vllm",
        host="",
        port=0,
        specs=vllm_specs(old, ports=(1,), gpus=gpus),
        start_timeout_s=1,
        grace_s=1,
        drain_s=1,
    )
    change = make_change(old, new, order, lambda plan: vllm_specs(plan, ports=(7,), gpus=gpus)[0], drain_s=9)
    assert [spec.weight for spec in change.after.specs] == [
        part.replica_weight for part in new.llms for _ in part.slots
    ]
