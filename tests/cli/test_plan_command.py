import json
from dataclasses import replace

import pytest

from scepsy.cli import main
from scepsy.files import save_plan
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.plan import LLMPlan, Plan, Prediction, Slot


def make_plan(writer, generator=((0,),), latency_s=2.0):
    def part(llm, devices, fraction):
        return LLMPlan(
            llm=llm,
            model=llm,
            tensor_parallel_size=len(devices[0]),
            fraction=fraction,
            replicas=len(devices),
            slots=tuple(Slot(node="node0", devices=one) for one in devices),
            max_num_seqs=8,
            max_num_batched_tokens=64,
            max_model_len=64,
            gpu_memory_utilization=0.9,
        )

    prediction = Prediction(
        latency_s=latency_s, max_rate_rps=4.0, bottleneck="writer", lower_bound_s=latency_s, gap=0.0, tool_s=0.0
    )
    return Plan(
        cluster=parse_cluster("4xH100"),
        rate_rps=1.0,
        llms=(part("writer", writer, 1.0), part("generator", generator, 0.5)),
        prediction=prediction,
    )


@pytest.fixture
def files(tmp_path):
    def write(**plans):
        for name, plan in plans.items():
            save_plan(plan, tmp_path / f"{name}.yaml")
        return [str(tmp_path / f"{name}.yaml") for name in plans]

    return write


def test_diff_says_what_stays_starts_and_stops(files, capsys):
    old, new = files(old=make_plan([(1,)]), new=make_plan([(1,), (2,)], latency_s=1.5))
    assert main(["plan", "diff", old, new]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "writer: start tensor_parallel_size 1 on node0: 2",
        "2 replicas stay, 1 start, 0 stop",
        "rate 1 -> 1 executions/s, mean latency 2 -> 1.5 s, highest rate 4 -> 4/s, devices 1.5 -> 2.5",
    ]
    assert main(["plan", "diff", old, old]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "nothing changes: 2 replicas stay"


def test_diff_names_who_is_interrupted(files, capsys):
    full = [(0,), (1,)]
    before = replace(make_plan([(2,), (3,)], [(0,), (0,), (1,), (1,)]), prediction=None)
    after = replace(make_plan(full, [(2,), (2,), (3,), (3,)]), prediction=None)
    old, new = files(old=before, new=after)
    assert main(["plan", "diff", old, new]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "0 replicas stay, 6 start, 6 stop"
    old, new = files(
        old=replace(make_plan([(0, 1, 2)], [(3,), (3,)]), prediction=None),
        new=replace(make_plan([(0, 1, 2, 3)], [(3,)]), prediction=None, llms=make_plan([(0, 1, 2, 3)]).llms[:1]),
    )
    assert main(["plan", "diff", old, new]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("without any replica for a while: writer")


def test_show_has_the_places_and_what_is_wrong(files, capsys):
    good, bad = files(good=make_plan([(1, 2)]), bad=make_plan([(0,)]))
    assert main(["plan", "show", good]) == 0
    assert "writer (tensor_parallel_size 2) on node0: 1,2" in capsys.readouterr().out
    assert main(["plan", "show", bad]) == 1
    shown = capsys.readouterr().out
    assert "generator (0.5 of a device) on node0: 0" in shown
    assert "wrong: device 0 of 'node0' is given out 1.5 times, to 'writer', 'generator'" in shown


def test_what_is_infinite_is_null_in_json(files, capsys):
    (beyond,) = files(beyond=make_plan([(1,)], latency_s=float("inf")))

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    assert main(["plan", "show", beyond, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert shown["plan"]["prediction"]["latency_s"] is None
    assert shown["plan"]["llms"][0]["slots"] == [{"node": "node0", "devices": [1]}]
    assert shown["wrong"] == []


@pytest.mark.parametrize("words", [["show"], ["show", "--json"], ["diff", "good.yaml"], ["export", "--to", "litellm"]])
def test_a_node_that_the_cluster_does_not_have_is_told_in_one_line(files, tmp_path, capsys, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    files(good=make_plan([(1,)]))
    text = (tmp_path / "good.yaml").read_text()
    (tmp_path / "bad.yaml").write_text(text.replace("- node: node0", "- node: other", 1))
    assert main(["plan", *words, "bad.yaml"]) == 2
    told = "bad.yaml: plan: 'writer' replica 0: the cluster has no node 'other', it has node0; correct its slots"
    assert told in capsys.readouterr().err.splitlines()[-1]


def test_a_plan_that_gives_a_device_out_twice_is_not_replayed(files, capsys):
    (bad,) = files(bad=make_plan([(0,)]))
    assert main(["replay", bad, "traces"]) == 2
    assert "plan: device 0 of 'node0' is given out 1.5 times, to 'writer', 'generator'; correct" in (
        capsys.readouterr().err
    )


def test_a_plan_that_is_not_there(capsys):
    assert main(["plan", "diff", "none.yaml", "none.yaml"]) == 2
    assert "no such file" in capsys.readouterr().err
