"""Device types by the names that drivers and clusters give to their products."""

from __future__ import annotations

import re
from typing import Final

from scepsy_optimizer.cluster import DEVICE_MEMORY_GIB

# GPU feature discovery adds "SHARED" to the product of a time-sliced device; the rest are brands.
_NO_PART_OF_THE_TYPE: Final = frozenset({"", "NVIDIA", "TESLA", "GEFORCE", "SHARED"})
_SAME_MEMORY: Final = 0.05
_MIG: Final = re.compile(r"[ -]MIG[ -](?P<profile>\d+g\.\d+gb\S*)", re.IGNORECASE)


def device_type_of(product: str, memory_gib: float | None = None) -> str:
    """The device type of a product: "NVIDIA H100 80GB HBM3" and "NVIDIA-H100-80GB-HBM3" are H100.

    A product of another size than the known one carries its size ("A100_40GB"), and a MIG instance its profile
    ("H100_MIG_1G_10GB"), because profiles of the known device do not hold there. An unknown product is called by its
    own name in capitals ("T4").
    """
    mig = _MIG.search(product)
    whole = product if mig is None else product[: mig.start()]
    words = [word for word in re.split(r"[^A-Z0-9]+", whole.upper()) if word not in _NO_PART_OF_THE_TYPE]
    parts = {kind: kind.split("_") for kind in DEVICE_MEMORY_GIB if kind != "CPU"}
    fitting = [kind for kind in parts if set(parts[kind]) <= set(words)]
    known = max(fitting, key=lambda kind: len(parts[kind]), default="")
    base = known or "_".join(words) or "GPU"
    if mig is not None:
        return f"{base}_MIG_{re.sub('[^A-Z0-9]+', '_', mig['profile'].upper())}"
    if not known or memory_gib is None:
        return base
    usual = DEVICE_MEMORY_GIB[known]
    return known if abs(memory_gib - usual) <= _SAME_MEMORY * usual else f"{known}_{round(memory_gib)}GB"
