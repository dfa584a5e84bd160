"""The soak of `benchmarks/capture_soak.py`, for a moment: the same programs, faults and counts."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # connections that were cut or left, as they are meant to be
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the same, told at collection
def test_no_call_is_lost_or_twice_when_everything_goes_wrong(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.capture_soak import soak

    counts = soak(tmp_path, seconds=60, calls=100, workflows=20)
    assert counts["calls_told"] >= 100
    assert min(counts[kind] for kind in ("requests", "cancelled", "abandoned")) > 0
    assert (counts["lost"], counts["twice"], counts["left_open"]) == (0, 0, 0)
