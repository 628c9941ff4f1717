"""The report page in a real browser, where there is one."""

import html
import json
import re
import shutil
import subprocess

import jax.numpy as jnp
import pytest

from fastvi import estimate_llc, write_report

BROWSER = (
    shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-sync",
    "--hide-scrollbars",
    "--window-size=1440,900",
]
FLAGS += [
    "--disable-background-networking",
    "--disable-component-update",
    "--enable-logging=stderr",
    "--v=0",
]


# What is wider than its place, or than the page; for a copy that runs it. A window is never
# narrower than 500 pixels, so the page is.
MEASURE = """<script>
document.documentElement.style.width = "WIDTHpx";
const all = [...document.querySelectorAll("body *")];
const clipped = all.filter(one => one.getBoundingClientRect().right > WIDTH + 1 ||
  (!one.closest("svg") && one.clientWidth > 0 && one.scrollWidth > one.clientWidth + 1));
document.title = JSON.stringify([innerWidth, clipped.map(one => one.outerHTML.slice(0, 99))]);
</script></body>"""


def visit(page, folder):
    """Return the DOM, the console's lines and the addresses that the page itself asked for."""
    log = folder / "net.json"
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=2000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    events = json.loads(log.read_text(encoding="utf-8"))["events"]
    params = [event["params"] for event in events if "initiator" in event.get("params", {})]
    asked = {found["url"] for found in params if found["initiator"] != "not an origin"}
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], asked


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_shows_the_report_without_errors_or_requests(tmp_path):
    data = (jnp.ones((100, 1)),)
    loss = lambda w, batch: 0.5 * jnp.sum(w**2) + 0.0 * jnp.sum(batch[0])  # noqa: E731
    options = {"method": "variational", "steps": 100, "num_chains": 2, "progress": False}
    result = estimate_llc(loss, jnp.zeros(4), data, **options)
    page = write_report(result, tmp_path / "report.html")
    dom, console, asked = visit(page, tmp_path)
    assert dom.count("<figure>") >= 8
    assert dom.count('class="value"') > 100
    assert console == []
    assert asked == set()
    measured = tmp_path / "measured.html"
    for width in (360, 1440):
        script = MEASURE.replace("WIDTH", str(width))
        words = page.read_text(encoding="utf-8").replace("</body>", script)
        measured.write_text(words, encoding="utf-8")
        dom, *_ = visit(measured, tmp_path)
        title = html.unescape(re.search("<title>(.*?)</title>", dom, re.DOTALL)[1])
        assert json.loads(title) == [1440, []]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_errors_and_requests_would_be_seen(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        '<img src="http://example.invalid/a.png"><script>console.error("boom")</script>'
    )
    _, console, asked = visit(page, tmp_path)
    assert "boom" in console[0]
    assert asked == {"http://example.invalid/a.png"}
