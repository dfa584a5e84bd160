"""Put what the benchmarks have printed into docs/evaluation.md, each at its place.

`make bench` leaves what each benchmark prints in build/bench/NAME.txt. In the document the place of a benchmark is
between two comments, `<!-- benchmarks.NAME -->` and `<!-- end -->`; the text around them is written by hand. What was
not run keeps what is there. Pictures go from build/bench/plots to docs/pictures/evaluation. Exits with 1
where a file has no place.
"""

from __future__ import annotations

import re
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "evaluation.md"
OUTPUTS = ROOT / "build" / "bench"
PICTURES = ROOT / "docs" / "pictures" / "evaluation"


def main() -> int:
    """Refresh every place whose benchmark has been run."""
    text = DOCUMENT.read_text()
    homeless = []
    for path in sorted(OUTPUTS.glob("*.txt")):
        place = re.compile(rf"(<!-- benchmarks\.{path.stem} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not place.search(text):
            homeless.append(path.stem)
            continue
        shown = block(path)
        text = place.sub(lambda found, shown=shown: f"{found[1]}{shown}{found[2]}", text)
    DOCUMENT.write_text(text)
    PICTURES.mkdir(parents=True, exist_ok=True)
    for plot in OUTPUTS.glob("plots/*.svg"):
        shutil.copy(plot, PICTURES)
    if homeless:
        print(f"{DOCUMENT.relative_to(ROOT)} has no place for: {', '.join(homeless)}", file=sys.stderr)
    return 1 if homeless else 0


def block(path: Path) -> str:
    """The output of a benchmark without its line for programs, and when it was run."""
    lines = [line.rstrip() for line in path.read_text().splitlines() if not line.startswith('{"benchmark"')]
    day = datetime.fromtimestamp(path.stat().st_mtime, UTC).date()
    body = "\n".join(lines).strip("\n")
    return f"\n`python -m benchmarks.{path.stem}`, {day}:\n\n```text\n{body}\n```\n\n"


if __name__ == "__main__":
    sys.exit(main())
