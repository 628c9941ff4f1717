"""The parts of the benchmark harness that decide something."""

import numpy as np
import pytest

from bench import gate, harness, report

MACHINE = {"device": "cpu", "cpu": "a", "cores": "2", "load_average": "0", "jax": "0", "commit": "c"}


def row(date, ratio, low, high, *, name="fastvi", asked="2", **machine):
    values = {"group": "step", "name": name, "size": "1000", "floor": "gradient", "asked": asked, "date": date}
    blank = dict.fromkeys(("ms", "moved_mb", "least_mb", "peak_mb"), "")
    return {
        **values,
        **blank,
        "ratio": ratio,
        "ratio_p20": low,
        "ratio_p80": high,
        "ratio_least": ratio,
        **MACHINE,
        **machine,
    }


@pytest.mark.parametrize(("low", "verdict"), [("1.0", "ok"), ("2.08", "ok"), ("2.1", "slower"), ("nan", "slower")])
def test_the_gate_closes_beyond_the_spread(low, verdict):
    earlier, judged = row("1", "1.5", "1.4", "1.6"), row("2", "2.2", low, "2.3")
    [(_, found, ratio, bound)] = gate.compare([earlier, judged], "2", 1.3)
    assert (found, ratio) == (verdict, 2.2)
    np.testing.assert_allclose(bound, 1.3 * 1.6)


def test_the_gate_compares_like_with_like():
    rows = [row("1", "1", "1", "1", cpu="b"), row("1", "1", "1", "1", name="sgld"), row("2", "9", "9", "9")]
    assert [verdict for _, verdict, *_ in gate.compare(rows, "2", 1.3)] == ["new"]
    assert not gate.compare([row("1", "1", "1", "1"), row("2", "9", "9", "9", asked="")], "2", 1.3)


def test_ratios_are_formed_round_by_round(monkeypatch):
    times = iter([1.0, 2.0, 10.0, 20.0, 4.0, 8.0])  # a machine that slows down and recovers
    monkeypatch.setattr(harness, "seconds", lambda call: next(times))
    timings = harness.against("floor", {"floor": lambda: 0.0, "other": lambda: 0.0}, 3)
    assert timings["floor"].ratio == (1.0, 1.0, 1.0)
    assert timings["other"].ratio == (2.0, 2.0, 2.0)
    assert timings["other"].seconds[1] == 8.0
    assert timings["other"].least == 2.0


def test_the_report_fills_its_marks_with_the_last_row_of_the_machine(monkeypatch):
    rows = [row("1", "3", "3", "3"), row("2", "7", "7", "7", cpu="b"), row("3", "1.234", "1.2", "1.3")]
    monkeypatch.setattr(report, "load", lambda: rows)
    page = report.filled("a\n<!-- bench:speed -->\nold\n<!-- /bench:speed -->\nz\n")
    assert (
        page == "a\n<!-- bench:speed -->\n| d | fastvi |\n| --- | --- |\n| 1,000 | 1.23 |\n<!-- /bench:speed -->\nz\n"
    )
    assert report.filled(page) == page
