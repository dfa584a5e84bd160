"""Moments as they are written in files."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_LATEST = datetime(2500, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def parse_time_ns(value: object) -> int:
    """A moment, or one in ISO 8601, as nanoseconds since the epoch; without a zone it is UTC. 0 for what is neither."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return 0
    if not isinstance(value, datetime):
        return 0
    moment = value if value.tzinfo is not None else value.replace(tzinfo=UTC)
    return max(0, (moment - _EPOCH) // _MICROSECOND * 1000) if moment < _LATEST else 0
