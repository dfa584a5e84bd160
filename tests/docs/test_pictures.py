"""The committed pictures are those that their script draws."""

import importlib.util
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
_spec = importlib.util.spec_from_file_location("draw", PICTURES / "draw.py")
draw = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(draw)


@pytest.mark.parametrize("name", sorted(draw.PICTURES))
def test_is_as_drawn(name):
    drawn = draw.PICTURES[name]()
    assert (PICTURES / f"{name}.svg").read_text() == drawn
    assert ET.fromstring(drawn).tag.endswith("svg")  # noqa: S314 - our own text
