"""The lowest versions that pyproject.toml admits, as constraints for pip: `python tests/lowest.py > FILE`."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

_BOUND = re.compile(r"([A-Za-z0-9._-]+)>=([0-9][^,;]*)")
_EXTRAS = ("deploy", "otlp", "traces")


def constraints(pyproject: Path) -> Iterator[str]:
    """NAME==VERSION for every lower bound of the base and the extras that need no framework."""
    project = tomllib.loads(pyproject.read_text())["project"]
    extras = [need for extra in _EXTRAS for need in project["optional-dependencies"][extra]]
    for need in [*project["dependencies"], *extras]:
        if bound := _BOUND.match(need):
            yield f"{bound[1]}=={bound[2]}"


if __name__ == "__main__":
    sys.stdout.writelines(f"{line}\n" for line in constraints(Path(__file__).parents[1] / "pyproject.toml"))
