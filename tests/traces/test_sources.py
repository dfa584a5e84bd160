import codecs
import gzip
import json
import random
from itertools import pairwise

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


def flushed(text):
    """As a writer leaves a stream of zstd that it flushes and goes on with."""
    writer = zstandard.ZstdCompressor().compressobj()
    return writer.compress(text) + writer.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)


@pytest.fixture
def lines(line):
    """Enough of them that packed they fill many of the pieces in which a file is read."""
    noise = random.Random(1)
    return "".join(line(f"{noise.getrandbits(2048):x}") + "\n" for _ in range(400)).encode()


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        pytest.param("gz", gzip.compress, id="gzip"),
        pytest.param("zst", zstandard.compress, id="zstd"),
        pytest.param("zst", flushed, id="zstd without its size"),
    ],
)
@pytest.mark.parametrize("left", [0.001, 0.5, 0.99])
def test_a_compressed_file_that_is_cut_off_is_one_clear_error(lines, tmp_path, suffix, compress, left):
    packed = compress(lines)
    path = tmp_path / f"spans.jsonl.{suffix}"
    path.write_bytes(packed[: int(len(packed) * left)])
    with pytest.raises(ScepsyError, match="cannot be read: Compressed file ended before the end") as caught:
        read_executions([path])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_the_last_of_several_frames_may_be_the_one_that_is_cut_off(line, tmp_path, suffix, compress):
    path = tmp_path / f"spans.jsonl.{suffix}"
    first, second = compress(f"{line('one')}\n".encode()), compress(f"{line('two')}\n".encode())
    path.write_bytes(first + second)
    assert len(read_executions([path]).executions) == 2
    for left in (2, 10, len(second) - 1):
        path.write_bytes(first + second[:left])
        with pytest.raises(ScepsyError, match="ended before the end"):
            read_executions([path])


def test_a_compressed_file_that_is_flushed_and_not_closed_is_cut_off(line, tmp_path):
    """As a collector leaves it while it runs. Gzip and zstd agree on it."""
    text = f"{line('one')}\n".encode()
    with gzip.open(tmp_path / "spans.jsonl.gz", "wb") as writer:
        writer.write(text)
        writer.flush()
        (tmp_path / "open.jsonl.gz").write_bytes((tmp_path / "spans.jsonl.gz").read_bytes())
    (tmp_path / "open.jsonl.zst").write_bytes(flushed(text))
    for suffix in ("gz", "zst"):
        with pytest.raises(ScepsyError, match="ended before the end"):
            read_executions([tmp_path / f"open.jsonl.{suffix}"])


def test_frames_of_zstd_may_be_of_any_size(lines, tmp_path):
    """None, a few bytes, many pieces; and one that decoders are to skip."""
    skipped = b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc"
    cuts = [0, 0, 1, 3, 100, 100_000, len(lines)]
    frames = [zstandard.compress(lines[start:end]) for start, end in pairwise(cuts)]
    path = tmp_path / "spans.jsonl.zst"
    path.write_bytes(skipped.join(frames) + skipped)
    assert len(read_executions([path]).executions) == 400


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_a_mark_of_utf8_before_the_first_line_is_passed_over(line, tmp_path, compress):
    path = tmp_path / "spans.jsonl"
    path.write_bytes(compress(codecs.BOM_UTF8 + f"{line('one')}\n{line('two')}\n".encode()))
    reading = read_executions([path])
    assert [execution.id for execution in reading.executions] == ["one", "two"]
    assert not reading.dropped


def test_a_mark_of_utf8_may_stand_before_json_over_many_lines_and_before_tables(line, tmp_path):
    path = tmp_path / "spans.json"
    path.write_text(json.dumps(json.loads(line("one")), indent=2), encoding="utf-8-sig")
    assert len(read_executions([path]).executions) == 1
    path.write_text("execution,model,start,duration\none,m,0,1\n", encoding="utf-8-sig")
    assert len(read_executions([path]).executions) == 1
    path.write_bytes(codecs.BOM_UTF8)
    with pytest.raises(ScepsyError, match="it is empty"):
        read_executions([path])


@pytest.mark.parametrize(("mark", "encoding"), [(codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")])
def test_utf16_is_one_clear_error(line, tmp_path, mark, encoding):
    path = tmp_path / "spans.jsonl"
    path.write_bytes(mark + f"{line('one')}\r\n".encode(encoding))
    for named in (path, tmp_path):
        with pytest.raises(ScepsyError, match="its text is in UTF-16; save it as UTF-8$") as caught:
            read_executions([named])
        assert str(path) in str(caught.value)
