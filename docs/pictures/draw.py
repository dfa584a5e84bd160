"""Draws the pictures of the documentation: `python docs/pictures/draw.py` writes them beside this file.

What they show of an execution is computed by the optimizer from the execution below, not drawn by hand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from scepsy_optimizer.executions import Call, Execution, Span
from scepsy_optimizer.pipeline import build_pipeline
from scepsy_optimizer.profile import PROPORTIONAL, FractionSlowdown
from scepsy_optimizer.timeline import compile_timeline
from scepsy_optimizer.workload import aggregate

STYLE = """
  text { font: 14px sans-serif; fill: #1f2a30 }
  .small { font-size: 12px; fill: #5a6870 }
  .middle { text-anchor: middle } .end { text-anchor: end } .inside { fill: #ffffff }
  .line { stroke: #5a6870; stroke-width: 1.5; fill: none } .axis { stroke: #9aa7ad }
  .box { fill: #eef2f3; stroke: #9aa7ad } .tip { fill: #5a6870 }
  .writer { fill: #00796b } .verifier { fill: #c2571a } .tool { fill: #78868d } .faint { opacity: 0.4 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e3e8ea } .small { fill: #a9b5ba } .inside { fill: #ffffff }
    .line { stroke: #a9b5ba } .box { fill: #2c363b; stroke: #66757c } .tip { fill: #a9b5ba }
  }
"""

# Two drafts at once, each checked as soon as it is there; a search; then the answer. Start, end, LLM, role.
CALLS = (
    (0.0, 4.0, "writer", "draft"),
    (0.0, 3.0, "writer", "draft"),
    (4.0, 4.8, "verifier", "check"),
    (3.0, 3.8, "verifier", "check"),
    (6.3, 9.3, "writer", "answer"),
)
SEARCH = (4.8, 6.3)
LANES = (0, 1, 0, 1, 0)


def execution() -> Execution:
    """The execution that the concepts page speaks of."""
    root = Span(id="0", parent=None, name="essay", kind="workflow", start_s=0.0, end_s=CALLS[-1][1])
    calls = [
        Span(
            id=str(number),
            parent="0",
            name=role,
            kind="llm",
            start_s=start_s,
            end_s=end_s,
            call=Call(llm=llm, role=role, input_tokens=300, output_tokens=100),
        )
        for number, (start_s, end_s, llm, role) in enumerate(CALLS, 1)
    ]
    search = Span(id="search", parent="0", name="search", kind="tool", start_s=SEARCH[0], end_s=SEARCH[1])
    return Execution(id="a", workflow="essay", spans=(root, *calls, search))


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """A picture for light and dark pages."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{title}">'
    tip = (
        '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path class="tip" d="M0 0 8 4 0 8z"/></marker>'
    )
    return "\n".join([head, f"<title>{title}</title>", f"<style>{STYLE}</style><defs>{tip}</defs>", *parts, "</svg>\n"])


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Words at a place."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}">{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A rectangle."""
    return f'<rect x="{x:.4g}" y="{y:.4g}" width="{width:.4g}" height="{height:.4g}" rx="4" class="{kind}"/>'


def arrow(*points: tuple[float, float]) -> str:
    """A line through points with a tip at its end."""
    path = " ".join(f"{x:g} {y:g}" for x, y in points)
    return f'<path class="line" marker-end="url(#tip)" d="M{path}"/>'


def loop() -> str:
    """Traces become a workload, a plan, engines."""
    steps = (
        ("agents", "LangChain, openai,", "LlamaIndex, any"),
        ("traces", "calls, times, tokens,", "what waited"),
        ("workload", "what an execution", "asks of each LLM"),
        ("plan", "shares of GPUs,", "replicas, places"),
        ("vLLM", "engines behind", "one endpoint"),
    )
    verbs = ("capture", "report", "optimize", "deploy")
    parts = []
    for number, (name, first, second) in enumerate(steps):
        x = 8 + number * 160
        parts += [
            box(x, 40, 124, 84, "box"),
            text(x + 62, 62, name, "middle"),
            text(x + 62, 86, first, "middle small"),
            text(x + 62, 104, second, "middle small"),
        ]
        if number < len(verbs):
            parts += [arrow((x + 126, 82), (x + 158, 82)), text(x + 142, 30, verbs[number], "middle small")]
    last = 8 + 4 * 160 + 62
    parts += [arrow((last, 126), (last, 158), (70, 158), (70, 127)), text(390, 152, "OPENAI_BASE_URL", "middle small")]
    return svg(780, 170, "Traces become a workload, a plan, and engines behind one endpoint", parts)


def legend(y: float) -> Iterator[str]:
    """What the colours mean."""
    for x, kind, words in ((20, "writer", "writer"), (95, "verifier", "verifier"), (180, "tool", "no LLM")):
        yield box(x, y, 14, 14, kind)
        yield text(x + 20, y + 12, words, "small")


def timeline() -> str:
    """An execution, its critical path in full colour."""
    compiled = compile_timeline(execution())
    path = set(compiled.critical_path(compiled.traced_s).calls)
    on_path = [compiled.span_ids[index] for index in path]
    scale = 62

    def bars() -> Iterator[str]:
        for number, ((start_s, end_s, llm, role), lane) in enumerate(zip(CALLS, LANES, strict=True), 1):
            faint, inside = ("", "middle inside") if str(number) in on_path else (" faint", "middle")
            x, y = 20 + start_s * scale, 20 + lane * 46
            yield box(x, y, (end_s - start_s) * scale - 2, 36, llm + faint)
            yield text(x + (end_s - start_s) * scale / 2, y + 23, role, inside)
        x = 20 + SEARCH[0] * scale
        yield box(x, 20, (SEARCH[1] - SEARCH[0]) * scale - 2, 36, "tool")
        yield text(x + (SEARCH[1] - SEARCH[0]) * scale / 2, 43, "search", "middle inside")

    axis = [text(20 + second * scale, 136, f"{second} s", "small") for second in range(0, 10, 3)]
    return svg(
        620,
        180,
        "An execution and its critical path",
        [*bars(), *axis, *legend(152), text(275, 164, "full colour: the critical path; faint: has slack", "small")],
    )


def pipeline() -> str:
    """The shares of the LLMs, and the same execution as stages of the pipeline."""
    workload = aggregate([execution()])
    stages = build_pipeline(workload)
    compiled = compile_timeline(execution())
    path = compiled.critical_path(compiled.traced_s)
    seconds = {stage.llm: 0.0 for stage in stages.stages}
    for index in path.calls:
        seconds[compiled.calls[index].llm] += compiled.traced_s[index]

    def row(y: float, name: str, pieces: Sequence[tuple[str, float, str]], whole: float) -> Iterator[str]:
        yield text(20, y + 23, name)
        x = 170.0
        for kind, size, label in pieces:
            width = 430 * size / whole
            yield box(x, y, width - 2, 36, kind)
            yield text(x + width / 2, y + 23, label, "middle inside")
            x += width

    shares = [(each.llm, each.share, f"{each.share:.0%}") for each in workload.demands]
    parts = [(llm, time_s, f"{time_s:.1f} s") for llm, time_s in seconds.items()]
    parts.append(("tool", path.fixed_s, f"{path.fixed_s:.1f} s"))
    rows = [
        *row(20, "shares of LLM time", shares, 1.0),
        *row(70, "stages of the latency", parts, path.makespan_s),
    ]
    return svg(620, 150, "Shares and pipeline stages of the same execution", [*rows, *legend(124)])


def fractions() -> str:
    """What a part of a device is worth: capacity, and how long a step takes."""
    slowdown = FractionSlowdown()
    parts = []
    for number, fraction in enumerate((1.0, 0.5, 0.2, 0.1)):
        x = 100 + number * 135
        parts += [text(x, 30, f"{fraction:g} of a GPU")]
        for line, (factor, kind) in enumerate(
            (
                (slowdown.decode(fraction, 32), "writer"),
                (slowdown.prefill(fraction), "verifier"),
                (PROPORTIONAL.prefill(fraction), "tool"),
            )
        ):
            y = 46 + line * 30
            parts += [box(x, y, 8 * factor, 22, kind), text(x + 8 * factor + 6, y + 16, f"{factor:.1f}", "small")]
    labels = [
        text(88, 62 + 30 * line, name, "end small") for line, name in enumerate(("decode", "prefill", "MIG, quotas"))
    ]
    return svg(640, 146, "How much longer a step takes on a fraction of a GPU", [*parts, *labels])


PICTURES = {"loop": loop, "timeline": timeline, "pipeline": pipeline, "fractions": fractions}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        Path(__file__).with_name(f"{name}.svg").write_text(draw(), encoding="utf-8")
