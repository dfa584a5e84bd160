"""The part of vLLM's Prometheus metrics that says how loaded and how fast it is, under vLLM's names."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from scepsy.emulator.pace import Generation
from scepsy_optimizer.engine import Engine

_LABELS = ("model_name", "engine")
_LATENCY_BUCKETS_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
_FIRST_TOKEN_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40)
_TOKEN_BUCKETS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)


class Metrics:
    """Counts of one emulated engine."""

    def __init__(self, llm: str, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        labels = {"model_name": llm, "engine": "0"}
        self._labels = labels

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, _LABELS, registry=self._registry).labels(**labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, _LABELS, registry=self._registry).labels(**labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, _LABELS, registry=self._registry, buckets=buckets).labels(**labels)

        gauge("vllm:num_requests_running", "Requests in the running batch.").set_function(lambda: engine.running)
        gauge("vllm:num_requests_waiting", "Requests waiting to be processed.").set_function(lambda: engine.waiting)
        gauge("vllm:kv_cache_usage_perc", "KV cache usage, 1 is all of it.").set_function(
            lambda: engine.kv_used / engine.kv_tokens
        )
        self._prompt = counter("vllm:prompt_tokens", "Prefill tokens processed.")
        self._generated = counter("vllm:generation_tokens", "Tokens generated.")
        self._success = Counter(
            "vllm:request_success", "Finished requests.", (*_LABELS, "finished_reason"), registry=self._registry
        )
        self._first = histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", _FIRST_TOKEN_BUCKETS_S)
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds", "Decode time per token after the first.", _TOKEN_BUCKETS_S
        )
        self._whole = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", _LATENCY_BUCKETS_S)
        self._queue = histogram("vllm:request_queue_time_seconds", "Arrival to first step.", _LATENCY_BUCKETS_S)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "First step to first token.", _LATENCY_BUCKETS_S)
        self._inference = histogram(
            "vllm:request_inference_time_seconds", "First step to last token.", _LATENCY_BUCKETS_S
        )
        self._decode = histogram("vllm:request_decode_time_seconds", "First to last token.", _LATENCY_BUCKETS_S)

    def finished(self, generation: Generation, reason: str) -> None:
        """Count a sequence that ended: `reason` is "stop", "length" or "abort"."""
        self._success.labels(**self._labels, finished_reason=reason).inc()
        scheduled_s, first_s, finished_s = generation.scheduled_s, generation.first_token_s, generation.finished_s
        if scheduled_s is None or first_s is None:
            return
        self._prompt.inc(generation.prompt_tokens)
        self._first.observe(first_s - generation.arrived_s)
        if finished_s is None:
            return
        self._generated.inc(generation.output_tokens)
        self._whole.observe(finished_s - generation.arrived_s)
        self._queue.observe(scheduled_s - generation.arrived_s)
        self._prefill.observe(first_s - scheduled_s)
        self._inference.observe(finished_s - scheduled_s)
        decode_s = finished_s - first_s
        self._decode.observe(decode_s)
        if generation.output_tokens > 1:
            self._per_token.observe(decode_s / (generation.output_tokens - 1))

    def text(self) -> bytes:
        """All counts in Prometheus' text format."""
        return generate_latest(self._registry)
