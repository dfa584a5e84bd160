import json
import re
import shutil
import subprocess
from dataclasses import replace
from fractions import Fraction

import pytest

from scepsy.report.plan_page import render_plan_page, summarise_plan, write_plan_page
from scepsy.report.sentences import describe_plan
from scepsy_optimizer.allocation import Choice
from scepsy_optimizer.cluster import parse_cluster
from scepsy_optimizer.errors import ScepsyError
from scepsy_optimizer.frontier import FrontierPoint
from scepsy_optimizer.plan import LLMPlan, Plan, Prediction, ReplayedLatency, Slot

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def part(llm, devices, *, fraction=1.0, load=0.4):
    return LLMPlan(
        llm=llm,
        model=f"org/{llm}",
        tensor_parallel_size=len(devices[0]),
        fraction=fraction,
        replicas=len(devices),
        slots=tuple(Slot(node="node0", devices=one) for one in devices),
        max_num_seqs=8,
        max_num_batched_tokens=64,
        max_model_len=64,
        gpu_memory_utilization=0.9,
        rate_rps=4.0,
        predicted_call_s=0.5,
        utilisation=load,
    )


PREDICTION = Prediction(
    latency_s=4.0,
    max_rate_rps=5.0,
    bottleneck="writer",
    lower_bound_s=3.9,
    gap=0.025,
    tool_s=0.5,
    workflow_latency_s={"essay": 5.0, "</script><b>poem": 3.0},
    replayed=ReplayedLatency(mean_s=4.1, p50_s=3.5, p95_s=8.0, p99_s=9.5, executions=400),
    llm_latency_s={"writer": 3.0, "judge": 0.5},
)


@pytest.fixture
def plan():
    return Plan(
        cluster=parse_cluster("4xH100"),
        rate_rps=2.0,
        llms=(part("writer", [(0, 1)]), part("writer", [(2,)]), part("judge", [(3,), (3,)], fraction=0.2)),
        prediction=PREDICTION,
        provenance={"made": "2030-01-01", "traces": "scepsy-traces"},
    )


def point(devices, rate_rps, latency_s):
    whole = Choice(tensor_parallel_size=1, fraction=Fraction(1), replicas=devices - 1)
    half = Choice(tensor_parallel_size=1, fraction=Fraction(1, 2), replicas=2)
    return FrontierPoint(
        devices=devices,
        rate_rps=rate_rps,
        latency_s=latency_s,
        lower_bound_s=latency_s,
        allocation={"writer": (whole,), "judge": (half,)},
    )


@pytest.fixture
def frontier():
    """Two rates; three devices are no better than two at the lower one, so that there is no such point."""
    return (
        point(2, 1.0, 6.0), point(4, 1.0, 3.0),
        point(4, 2.0, 4.0), point(6, 2.0, 2.5),
        point(6, 4.0, 5.0),
    )  # fmt: skip


def test_every_device_shows_the_parts_that_are_given_out(plan):
    (node,) = summarise_plan(plan, name="plan.yaml")["nodes"]
    (domain,) = node["domains"]
    shown = {device["number"]: [(one["replica"], one["fraction"]) for one in device["parts"]] for device in domain}
    assert shown == {
        0: [("writer-0", 1)], 1: [("writer-0", 1)], 2: [("writer-1", 1)], 3: [("judge-0", 0.2), ("judge-1", 0.2)],
    }  # fmt: skip
    assert [one["rank"] for device in domain for one in device["parts"] if one["ranks"] == 2] == [0, 1]


def test_a_cell_has_the_best_that_is_no_larger_and_carries_the_rate(plan, frontier):
    found = summarise_plan(plan, name="plan.yaml", frontier=frontier)["what_if"]
    assert (found["rates"], found["devices"]) == ([1.0, 2.0, 4.0], [2, 3, 4, 5, 6])
    latencies = [[cell and cell["latency_s"] for cell in row] for row in found["cells"]]
    assert latencies == [
        [6.0, 6.0, 3.0, 3.0, 2.5],
        [None, None, 4.0, 4.0, 2.5],
        [None, None, None, None, 5.0],
    ]
    assert found["cells"][1][2]["llms"] == {"writer": "3 x 1 device", "judge": "2 x 0.5 device"}


def test_the_words_say_bottleneck_time_tail_and_bound(plan):
    bottleneck, time, tail, bound = describe_plan(plan)
    assert "The bottleneck is writer: at 5 executions/s" in bottleneck
    assert "the 2/s of this plan are 40 % of that" in bottleneck
    assert "3 s (75 %) are waiting for writer" in time
    assert "95 of 100 within 8 s" in tail
    assert "No allocation of as many devices can have a mean latency under 3.9 s" in bound
    assert "at most 2.5 % less" in bound
    best = replace(
        plan, prediction=replace(PREDICTION, gap=0.0, objective_s=4.0), llms=(part("writer", [(0, 1, 2, 3)]),)
    )
    assert (
        "No allocation on this cluster has a lower mean latency with the workflows' weights" in describe_plan(best)[-1]
    )
    assert describe_plan(replace(plan, prediction=None)) == [
        "This plan was written without a prediction: nothing is known of its latency and load."
    ]


def test_a_plan_beyond_saturation_has_no_page(plan):
    beyond = replace(plan, prediction=replace(PREDICTION, latency_s=float("inf")))
    with pytest.raises(ScepsyError, match="not finite; plan anew"):
        render_plan_page(beyond, name="plan.yaml")


def test_commands_fit_the_cluster_and_the_shell(plan):
    words = [one["command"] for one in summarise_plan(plan, name="my plan.yaml")["commands"]]
    assert "scepsy deploy 'my plan.yaml'" in words
    wide = replace(plan, cluster=parse_cluster("2x4xH100"))
    far = [one["command"] for one in summarise_plan(wide, name="plan.yaml")["commands"]]
    assert "scepsy deploy plan.yaml" not in far
    assert "scepsy deploy plan.yaml --to ray" in far


def test_the_page_needs_no_network_and_escapes_names(plan, frontier, tmp_path):
    page = render_plan_page(plan, name="plan.yaml", frontier=frontier)
    data = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.DOTALL)[1]
    assert json.loads(data) == json.loads(json.dumps(summarise_plan(plan, name="plan.yaml", frontier=frontier)))
    assert set(re.findall(r"https?://[^\"' )]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|iframe)|src=|@import|fetch\(|XMLHttpRequest", page)
    with pytest.raises(ScepsyError, match="cannot be written"):
        write_plan_page(plan, tmp_path, name="plan.yaml")


def open_page(browser, page, action, folder, *look):
    base = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr",
    ]  # fmt: skip
    return subprocess.run([*base, *look, action, page.as_uri()], capture_output=True, text=True, timeout=60, check=True)


MOVE = """<script>
addEventListener("load", () => {
  const note = (key) => { document.body.dataset[key] = document.getElementById("outcome").textContent; };
  const move = (id, to) => {
    const dial = document.getElementById(id);
    dial.value = to;
    dial.dispatchEvent(new Event("input"));
  };
  note("own"); move("devices", 4); note("more"); move("rate", 2); move("devices", 0); note("less");
  document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth ? "yes" : "no";
});
</script>"""


@pytest.mark.browser
def test_a_browser_shows_what_there_is_of_a_plan_without_prediction(plan, tmp_path):
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    assert browser is not None, f"install one of {', '.join(BROWSERS)}"
    bare = replace(plan, prediction=None, provenance={}, cluster=parse_cluster("4xH100+2xL40S"))
    write_plan_page(bare, tmp_path / "plan.html", name="plan.yaml")
    shown = open_page(browser, tmp_path / "plan.html", "--dump-dom", tmp_path)
    assert 'data-ready="yes"' in shown.stdout, shown.stderr
    assert "CONSOLE" not in shown.stderr, shown.stderr
    assert "written without a prediction" in shown.stdout
    assert "searched when the plan is made" in shown.stdout
    assert 'aria-label="node1, device 0: 100 % free"' in shown.stdout


@pytest.mark.browser
@pytest.mark.parametrize(("width", "scheme"), [(1240, "light"), (390, "dark")])
def test_a_browser_shows_it_and_the_sliders_answer(plan, frontier, tmp_path, width, scheme):
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    assert browser is not None, f"install one of {', '.join(BROWSERS)}"
    text = render_plan_page(plan, name="plan.yaml", frontier=frontier)
    page = tmp_path / "plan.html"
    page.write_text(text.replace("</body>", f"{MOVE}</body>"))
    look = (f"--window-size={width},2400", f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}")
    shown = open_page(browser, page, "--dump-dom", tmp_path, *look)
    dom = shown.stdout
    assert 'data-ready="yes"' in dom, shown.stderr
    assert "CONSOLE" not in shown.stderr, shown.stderr
    assert 'data-wide="no"' in dom
    assert len(re.findall(r'<div class="part"', dom)) == 5
    assert 'aria-label="judge-1, 0.2 of it, node0, device 3, load 40 %"' in dom
    assert 'data-own="4 s mean latency, as planned."' in dom
    assert 'data-more="2.5 s mean latency: 38 % less than this plan\u2019s 4 s."' in dom
    assert 'data-less="out of reach: 2 H100 carry 1/s of these rates; 4/s takes 6 of them."' in dom
    assert 'aria-valuetext="2 H100"' in dom
    assert "&lt;/script&gt;&lt;b&gt;poem" in dom
    picture = tmp_path / "plan.png"
    open_page(browser, page, f"--screenshot={picture}", tmp_path, *look)
    assert picture.stat().st_size > 50_000
