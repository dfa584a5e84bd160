import gzip
import json

import pytest
import zstandard

from scepsy.traces import read_executions
from scepsy.traces.reading import NO_TRACES
from scepsy.traces.sources import NOT_JSON, NOT_SPANS, TORN
from scepsy_optimizer.errors import ScepsyError


@pytest.fixture
def line(otlp):
    def one(trace):
        return json.dumps(otlp.request(otlp.workflow("a", "", "w", 0, 1, trace=trace)))

    return one


def test_a_torn_last_line_is_counted(line, tmp_path):
    path = tmp_path / "spans.jsonl"
    path.write_text(line("one") + "\n" + line("two")[:80])
    reading = read_executions([path])
    assert [execution.id for execution in reading.executions] == ["one"]
    assert reading.dropped == {TORN: 1}


def test_a_last_line_without_its_newline_is_whole(line, tmp_path):
    path = tmp_path / "spans.jsonl"
    path.write_text(line("one") + "\n" + line("two"))
    assert len(read_executions([path]).executions) == 2


def test_noise_between_lines_is_counted(line, tmp_path):
    path = tmp_path / "spans.jsonl"
    path.write_text("\n".join(["{oops", line("one"), "", '{"resourceLogs": []}', "[1, 2]"]) + "\n")
    assert read_executions([path]).dropped == {NOT_JSON: 1, NOT_SPANS: 3}


def test_lines_after_a_torn_first_one_are_read(line, tmp_path):
    path = tmp_path / "spans.jsonl"
    torn = line("zero")
    path.write_text(torn[: torn.rindex(",") + 1] + "\n" + line("one") + "\n" + line("two") + "\n")
    reading = read_executions([path])
    assert [execution.id for execution in reading.executions] == ["one", "two"]
    assert reading.dropped[NOT_JSON] == 1


def test_directories_files_and_gzip_each_once(line, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "one.jsonl").write_text(line("one") + "\n")
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(line("two").encode()))
    (tmp_path / "notes.txt").write_text("no traces")
    reading = read_executions([tmp_path, tmp_path / "deep" / "one.jsonl"])
    assert sorted(execution.id for execution in reading.executions) == ["one", "two"]
    assert reading.files == 2


def test_a_directory_may_hold_files_without_traces(line, tmp_path):
    """As a process leaves them that ended before its first span; named on their own they are an error."""
    (tmp_path / "one.jsonl").write_text(line("one") + "\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "settings.json").write_text('{"theme": "dark"}')
    (tmp_path / "prices.csv").write_text("item,price\ncake,3\n")
    reading = read_executions([tmp_path])
    assert [execution.id for execution in reading.executions] == ["one"]
    assert reading.dropped[NO_TRACES] == 3
    with pytest.raises(ScepsyError, match="it is empty"):
        read_executions([tmp_path, tmp_path / "empty.jsonl"])


def test_executions_come_in_the_order_of_their_start(otlp, tmp_path):
    late = otlp.workflow("a", "", "w", 5, 6, trace="late")
    early = otlp.workflow("a", "", "w", 1, 9, trace="early")
    path = otlp.write(tmp_path / "spans.jsonl", otlp.request(late), otlp.request(early))
    assert [execution.id for execution in read_executions([path]).executions] == ["early", "late"]


@pytest.mark.parametrize(
    ("content", "found"),
    [("", "nothing: it is empty"), ("hello\n", "1 lines, none of them"), ('{"a": 1}\n', "1 lines, none of them")],
)
def test_a_file_without_traces_is_one_clear_error(tmp_path, content, found):
    path = tmp_path / "spans.jsonl"
    path.write_text(content)
    with pytest.raises(ScepsyError, match=found) as caught:
        read_executions([path])
    assert str(path) in str(caught.value)


def test_missing_paths_are_one_clear_error(tmp_path):
    with pytest.raises(ScepsyError, match="no such file"):
        read_executions([tmp_path / "nowhere"])
    with pytest.raises(ScepsyError, match="no trace files in this directory"):
        read_executions([tmp_path])


def test_damaged_gzip_is_one_clear_error(line, tmp_path):
    path = tmp_path / "spans.jsonl.gz"
    path.write_bytes(gzip.compress(line("one").encode())[:40])
    with pytest.raises(ScepsyError, match="cannot be read"):
        read_executions([path])


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_a_byte_gone_wrong_is_one_clear_error(line, tmp_path, suffix, compress):
    packed = bytearray(compress("".join(line(f"e{number}") for number in range(200)).encode()))
    packed[len(packed) // 2] ^= 0xFF
    packed[len(packed) // 2 + 1] ^= 0xFF
    path = tmp_path / f"spans.jsonl.{suffix}"
    path.write_bytes(packed)
    with pytest.raises(ScepsyError, match="cannot be read") as caught:
        read_executions([path])
    assert str(path) in str(caught.value)
