import asyncio
import os

import pytest

from scepsy.collect.store import FullError, TraceStore
from scepsy_optimizer.errors import ScepsyError


def contents(directory):
    return [path.read_bytes() for path in sorted(directory.iterdir())]


async def test_lines_go_to_one_file_after_another(tmp_path):
    store = TraceStore(tmp_path / "new" / "folder", file_bytes=10)
    for number in range(7):
        await store.write(b"%04d\n" % number)
    await store.write(b"longer than a whole file\n")
    await store.close()
    assert contents(tmp_path / "new" / "folder") == [
        b"0000\n0001\n",
        b"0002\n0003\n",
        b"0004\n0005\n",
        b"0006\n",
        b"longer than a whole file\n",
    ]
    assert store.files == 5


async def test_writers_at_once_lose_nothing_and_mix_nothing(tmp_path):
    store = TraceStore(tmp_path, file_bytes=4000)
    lines = [b"%05d-%s\n" % (number, b"x" * (number % 50)) for number in range(2000)]
    await asyncio.gather(*(store.write(line) for line in lines))
    await store.close()
    assert b"".join(contents(tmp_path)).splitlines(keepends=True) == lines
    assert all(len(content) <= 4000 for content in contents(tmp_path))


async def test_what_would_wait_too_much_is_refused(tmp_path):
    store = TraceStore(tmp_path, waiting_bytes=10)
    first = asyncio.create_task(store.write(b"12345678\n"))
    await asyncio.sleep(0)
    with pytest.raises(FullError):
        await store.write(b"12345678\n")
    await first
    await store.write(b"larger than all that may wait, but alone\n")
    await store.close()
    assert contents(tmp_path) == [b"12345678\nlarger than all that may wait, but alone\n"]


async def test_who_stops_waiting_has_written_nevertheless(tmp_path):
    store = TraceStore(tmp_path)
    task = asyncio.create_task(store.write(b"line\n"))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await store.close()
    assert contents(tmp_path) == [b"line\n"]


async def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    store = TraceStore(tmp_path)
    await store.write(b"one\n")
    real, failing = os.write, True

    def write(descriptor, data):
        if failing and bytes(data).startswith(b"two"):
            real(descriptor, data[:2])
            raise OSError(28, "No space left on device")
        return real(descriptor, data)

    monkeypatch.setattr("scepsy.collect.store.os.write", write)
    results = await asyncio.gather(store.write(b"two\n"), store.write(b"three\n"), return_exceptions=True)
    assert [type(result) for result in results] == [OSError, type(None)]
    failing = False
    await store.write(b"two\n")
    await store.close()
    assert contents(tmp_path) == [b"one\nthree\ntwo\n"]


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ScepsyError, match="file: traces cannot be written here: File exists"):
        TraceStore(tmp_path / "file")
    with pytest.raises(ScepsyError, match="/proc/none: traces cannot be written here"):
        TraceStore(tmp_path.__class__("/proc/none"))
