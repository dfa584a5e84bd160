import io

from rich.console import Console

from scepsy.report.terminal import print_report
from scepsy_optimizer.workload import aggregate


def test_the_terminal_tells_the_same(reading, summarised):
    workload = aggregate(reading.executions)
    summary = summarised(reading, timelines=False)
    out = io.StringIO()
    print_report(summary, workload, Console(file=out, width=120, color_system=None))
    shown = out.getvalue()
    assert "30 executions, 90 LLM calls, 180 spans" in shown
    for llm in summary["llms"]:
        assert f"{llm['share']:.1%}" in shown
    assert "left out: 2 lines that are <not> JSON" in shown
    assert "wall time: " in shown
    assert "</script><b>flow" in shown
    assert "write [it]" in shown
    assert "Note: The queueing of 100% of the calls is not recorded" in shown
    assert max(map(len, shown.splitlines()[:12])) <= 100
