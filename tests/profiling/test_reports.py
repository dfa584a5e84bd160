"""Reports of load generators, in the fields that their writers give them."""

import json

import pytest

from scepsy.profiling import Load, Response, read_points
from scepsy_optimizer.errors import ScepsyError

VLLM = {
    "completed": 200,
    "failed": 0,
    "num_prompts": 200,
    "request_rate": "inf",
    "burstiness": 1.0,
    "max_concurrency": 20,
    "total_input_tokens": 204800,
    "total_output_tokens": 25600,
    "request_throughput": 8.0,
    "mean_ttft_ms": 150.0,
    "mean_tpot_ms": 12.5,
}


def summary(mean):
    return {"successful": {"mean": mean}, "errored": {"mean": 0.0}}


def guidellm(strategy):
    return {
        "config": {"strategy": strategy},
        "metrics": {
            "request_totals": {"successful": 50, "errored": 0, "incomplete": 1, "total": 51},
            "requests_per_second": summary(1.9),
            "prompt_token_count": summary(1000.0),
            "output_token_count": summary(128.0),
            "time_to_first_token_ms": summary(80.0),
            "inter_token_latency_ms": summary(9.0),
        },
    }


def aiperf(config):
    def metric(avg, unit):
        return {"unit": unit, "avg": avg}

    return {
        "schema_version": "1.4",
        "request_throughput": metric(4.0, "requests/sec"),
        "request_count": metric(120.0, "requests"),
        "time_to_first_token": metric(95.0, "ms"),
        "inter_token_latency": metric(11.0, "ms"),
        "input_sequence_length": metric(512.0, "tokens"),
        "output_sequence_length": metric(64.0, "tokens"),
        "input_config": config,
    }


def read(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content))
    return [(point.load, point.measured) for point in read_points(path, tensor_parallel_size=2)]


def test_vllm_bench_serve(tmp_path):
    measured = Response(first_token_s=0.150, per_token_s=0.0125)
    closed = Load(input_tokens=1024, output_tokens=128, concurrency=20, waves=10)
    assert read(tmp_path, VLLM) == [(closed, measured)]
    # A rate that the engine did not keep up with is what it answered.
    paced = {**VLLM, "request_rate": 10.0, "max_concurrency": None}
    assert read(tmp_path, paced) == [(Load(input_tokens=1024, output_tokens=128, rate_rps=8.0), measured)]


def test_guidellm(tmp_path):
    runs = [
        guidellm({"type_": "synchronous"}),
        guidellm({"type_": "concurrent", "streams": 5}),
        guidellm({"type_": "throughput"}),
        guidellm({"type_": "poisson", "rate": 2.0}),
    ]
    found = read(tmp_path, {"metadata": {}, "benchmarks": runs})
    assert [load for load, _ in found] == [
        Load(input_tokens=1000, output_tokens=128, concurrency=1, waves=50),
        Load(input_tokens=1000, output_tokens=128, concurrency=5, waves=10),
        Load(input_tokens=1000, output_tokens=128, rate_rps=1.9),
    ]
    assert {measured for _, measured in found} == {Response(first_token_s=0.08, per_token_s=0.009)}


def test_aiperf(tmp_path):
    (found,) = read(tmp_path, aiperf({"phases": [{"name": "profiling", "type": "concurrency", "concurrency": 12}]}))
    assert found == (
        Load(input_tokens=512, output_tokens=64, concurrency=12, waves=10),
        Response(first_token_s=0.095, per_token_s=0.011),
    )
    (found,) = read(tmp_path, aiperf({"phases": [{"name": "profiling", "type": "poisson", "rate": 5.0}]}))
    assert found[0] == Load(input_tokens=512, output_tokens=64, rate_rps=4.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no run with a rate or a concurrency"),
        ({"benchmarks": [guidellm({"type_": "throughput"})]}, "no run with a rate or a concurrency"),
        ({**VLLM, "completed": 0}, "not a report that can be read: ZeroDivisionError"),
        ({"mean_ttft_ms": 1.0}, "not a report that can be read: KeyError: 'completed'"),
    ],
)
def test_what_cannot_be_used_is_one_clear_error(tmp_path, content, message):
    with pytest.raises(ScepsyError, match=message):
        read(tmp_path, content)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ScepsyError, match="cannot be read as JSON"):
        read_points(tmp_path / "broken.json", tensor_parallel_size=1)
