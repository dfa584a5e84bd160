import importlib.util
import sys
from pathlib import Path

import pytest

from scepsy_optimizer.executions import Call, Execution, Span
from scepsy_optimizer.profile import LLMProfile, Provenance, StepTimes


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)


_load(Path(__file__).with_name("allocations.py"))


def steps(size, *, scale=1.0, weights_gib=15.3):
    """Step times like an 8B model's on an H100, faster with tensor parallelism but not in proportion."""
    gain = size**0.7
    decode = ((0.0062, 0.0064, 0.0080), (0.0084, 0.0087, 0.0130), (0.0120, 0.0136, 0.0300))
    return StepTimes(
        tensor_parallel_size=size,
        batch_sizes=(1, 32, 128),
        context_tokens=(256, 1024, 8192),
        decode_s=tuple(tuple(time * scale / gain for time in row) for row in decode),
        prefill_tokens=(16, 2048, 8192),
        prefill_s=tuple(time * scale / gain for time in (0.0063, 0.0445, 0.1800)),
        weights_gib=weights_gib / size,
        overhead_gib=1.5,
        kv_bytes_per_token=147456.0 / size,
    )


@pytest.fixture(scope="session")
def make_profile():
    def make(llm, *, scale=1.0, sizes=(1, 2, 4), weights_gib=15.3, **changes):
        return LLMProfile(
            llm=llm,
            model=f"models/{llm}",
            device_type="H100",
            device_memory_gib=79.6,
            steps=tuple(steps(size, scale=scale, weights_gib=weights_gib) for size in sizes),
            provenance=Provenance(source="estimate", tool="made up", engine="vLLM", date="2026-01-01"),
            **changes,
        )

    return make


@pytest.fixture(scope="session")
def make_execution():
    """Build an execution from (llm, start_s, end_s) triples under one root, with one second of tool time at its end."""

    def make(name, triples, *, workflow="w", tokens=(500, 100)):
        end_s = max(end for _, _, end in triples) + 1
        root = Span(id="root", parent=None, name=workflow, kind="workflow", start_s=0, end_s=end_s)
        calls = tuple(
            Span(
                id=f"c{index}",
                parent="root",
                name=llm,
                kind="llm",
                start_s=start,
                end_s=end,
                call=Call(llm=llm, role="r", input_tokens=tokens[0], output_tokens=tokens[1]),
            )
            for index, (llm, start, end) in enumerate(triples)
        )
        return Execution(id=name, workflow=workflow, spans=(root, *calls))

    return make
