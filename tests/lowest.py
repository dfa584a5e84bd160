"""The lowest versions that pyproject.toml admits, as constraints for pip: `python tests/lowest.py > FILE`."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

_BOUND = re.compile(r"([A-Za-z0-9._-]+)>=([0-9][^,;]*)")
# Of what the tests themselves need and what needs a device or a cluster, the newest do.
_LEFT = {"dev", "docs", "examples", "haproxy", "kubernetes", "ray", "vllm"}


def constraints(pyproject: Path) -> Iterator[str]:
    """NAME==VERSION for every lower bound of the base and the main extras."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = {extra: needs for extra, needs in project["optional-dependencies"].items() if extra not in _LEFT}
    for need in [*project["dependencies"], *(need for needs in extras.values() for need in needs)]:
        if bound := _BOUND.match(need):
            yield f"{bound[1]}=={bound[2]}"


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in constraints(Path(__file__).parents[1] / "pyproject.toml"))
