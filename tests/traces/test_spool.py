import pytest

from scepsy.traces.dialects import normalise
from scepsy.traces.records import RawSpan, SpanRecord
from scepsy.traces.spool import Spool


def record(trace, index):
    return normalise(RawSpan(f"trace {trace}", str(index), "", "name", index, index + 1, "", {"gen_ai.usage.x": 1}, {}))


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_what_goes_in_comes_out_by_trace(limit):
    records = [record(index % 13, index) for index in range(100)]
    with Spool(limit=limit) as spool:
        for each in records:
            spool.add([each])
        by_trace = dict(spool.traces())
        assert sorted(spool.records(), key=lambda each: int(each.id)) == records
    assert len(by_trace) == 13
    for trace, found in by_trace.items():
        assert found == [each for each in records if each.trace == trace]
        assert all(isinstance(each, SpanRecord) for each in found)
