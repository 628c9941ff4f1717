"""The report page in a real browser, where there is one."""

import json
import shutil
import subprocess

import jax.numpy as jnp
import pytest

from fastvi import estimate_llc

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync", "--hide-scrollbars"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0"]


@pytest.fixture(scope="module")
def visit(tmp_path_factory):
    """Open a report and return its DOM, the console's lines and the addresses that were asked for."""
    folder = tmp_path_factory.mktemp("browser")
    data = (jnp.ones((100, 1)),)
    loss = lambda w, batch: 0.5 * jnp.sum(w**2) + 0.0 * jnp.sum(batch[0])  # noqa: E731
    options = {"correction": "none", "steps": 100, "num_chains": 2, "progress": False}
    page = estimate_llc(loss, jnp.zeros(4), data, **options).report(folder / "report.html")
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
    asked = {event["params"]["url"] for event in events if "url" in event.get("params", {})}
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line], asked


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_a_browser_shows_the_report_without_errors_or_requests(visit):
    dom, console, asked = visit
    assert dom.count("<figure>") >= 10
    assert console == []
    assert {address for address in asked if not address.startswith(("file:", "data:", "chrome"))} == set()
