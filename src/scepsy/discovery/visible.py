"""What CUDA_VISIBLE_DEVICES leaves of a machine's devices, read as CUDA reads it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

VARIABLE: Final = "CUDA_VISIBLE_DEVICES"
_SHORTEST_UUID: Final = 4


def left_visible(names: Sequence[Sequence[str]]) -> list[int]:
    """The numbers of the devices that are left, in the order of the variable; all where it is not set.

    `names` are those that each device goes by: the index of its GPU, UUIDs. CUDA takes the beginning of a UUID for the
    UUID, and ends the list at the first name that it does not know.
    """
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return list(range(len(names)))
    left: dict[int, None] = {}
    for name in (one.strip() for one in wanted.split(",")):
        named = [
            number
            for number, known in enumerate(names)
            if name in known or (len(name) >= _SHORTEST_UUID and any(one.startswith(name) for one in known))
        ]
        if not named:
            break
        left |= dict.fromkeys(named)
    return list(left)
