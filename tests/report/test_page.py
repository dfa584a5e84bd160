import json
import re
import shutil
import subprocess

import pytest

from scepsy.report.page import render_page, write_page
from scepsy_optimizer.errors import ScepsyError

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def summary(reading, summarised):
    return summarised(reading)


def test_the_page_holds_the_summary_and_nothing_of_the_network(summary):
    page = render_page(summary)
    data = re.search(r'<script type="application/json" id="report">(.*?)</script>', page, re.DOTALL)[1]
    assert {**json.loads(data), "warnings": None} == {**json.loads(json.dumps(summary)), "warnings": None}
    addresses = set(re.findall(r"https?://[^\"' )]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(link|img|iframe)|src=|@import|fetch\(|XMLHttpRequest", page)


def test_a_page_that_cannot_be_written_is_one_clear_error(summary, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ScepsyError, match="cannot be written"):
        write_page(summary, tmp_path / "file" / "page.html")
    write_page(summary, tmp_path / "made" / "for it" / "page.html")
    assert (tmp_path / "made" / "for it" / "page.html").exists()


@pytest.mark.browser
def test_a_browser_shows_it(summary, tmp_path):
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    assert browser is not None, f"install one of {', '.join(BROWSERS)}"
    page = tmp_path / "report.html"
    write_page(summary, page)
    base = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1240,3600", "--enable-logging=stderr",
    ]  # fmt: skip
    shown = subprocess.run([*base, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60, check=True)
    dom = shown.stdout
    assert 'data-ready="yes"' in dom, shown.stderr
    assert "CONSOLE" not in shown.stderr, shown.stderr
    assert dom.count('<rect class="share"') == 2
    assert dom.count('<rect class="part"') == 3
    assert dom.count('<rect class="call"') == 3
    assert dom.count('<rect class="node"') == 4
    assert "lines that are &lt;not&gt; JSON" in dom
    assert "&lt;/script&gt;&lt;b&gt;flow" in dom
    picture = tmp_path / "report.png"
    subprocess.run([*base, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=60, check=True)
    assert picture.stat().st_size > 50_000
