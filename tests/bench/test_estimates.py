"""What an error costs: the columns of estimates, their tables, and how the gate judges them."""

import math
import types

import numpy as np
import pytest

from bench import gate, harness, language_model, report
from bench.truth import compare
from bench.truth.problems import PROBLEMS
from bench.truth.reference import load_reference

MACHINE = {"device": "cpu", "cpu": "a", "cores": "2"}
ESTIMATE = types.SimpleNamespace(
    llc=20.0,
    llc_sem=0.5,
    dim=7,
    n_data=1000,
    work=types.SimpleNamespace(total_fge=300.0),
    timings=types.SimpleNamespace(total=10.0, compile=4.0),
)


def rows_of(date, values, *, column="relative_wnv", problem="p", **others):
    """Return rows of suite.csv, one for each key."""
    blank = dict.fromkeys(gate.JUDGED, "")
    row = {"problem": problem, **blank, "date": date, **MACHINE, **others}
    return [{**row, column: str(value)} for value in values]


def verdicts(rows, date="2", table="suite", allowed=1.3):
    return {name[1:3]: one for name, *one in gate.compare_estimates(table, rows, date, allowed)}


def test_an_error_is_set_beside_its_work():
    found = harness.efficiency(20.0, 0.5, 300.0, 6.0, 1000, 25.0)
    assert found == pytest.approx(
        {
            "work_normalized_variance": 0.25 * 300_000,
            "relative_wnv": 0.025**2 * 300,
            "relative_wnmse": 0.2**2 * 300,
            "fge_per_second": 50.0,
        }
    )
    assert harness.efficiency_of(ESTIMATE, 25.0) == found
    assert "relative_wnmse" not in harness.efficiency_of(ESTIMATE)


def test_four_times_the_work_of_independent_draws_costs_the_same():
    short, long = (
        harness.efficiency(20.0, 0.5 / share, 300.0 * share**2, 1.0, 50) for share in (1, 2)
    )
    for column in ("work_normalized_variance", "relative_wnv"):
        assert short[column] == pytest.approx(long[column])


def test_what_left_the_floats_is_infinitely_far_and_has_no_variance():
    found = harness.efficiency(math.nan, math.nan, 300.0, 6.0, 1000, 25.0)
    assert found["relative_wnmse"] == math.inf
    assert math.isnan(found["relative_wnv"])
    assert harness.efficiency(0.0, 0.5, 300.0, 6.0, 1000)["relative_wnv"] == math.inf


def test_rows_of_every_table_hold_the_columns():
    problem = PROBLEMS["quadratic_d10_c1"]()
    answer = load_reference(problem.name)["value"]
    row = compare.make_row(problem, "fastvi", "defaults", 0, 400.0, 300.0, 2.0, 0.1, 10.0, 6.0)
    assert row["fge_per_second"] == 50.0
    assert row["relative_wnmse"] == pytest.approx((2.0 / answer - 1) ** 2 * 300)
    assert row["work_normalized_variance"] == pytest.approx(0.01 * 300 * problem.n_data)
    assert compare.make_row(problem, "sgld", "lr", 0, 400.0, 300.0, 2.0, 0.1, 10.0)[
        "fge_per_second"
    ] == pytest.approx(30.0)
    row = harness.estimate_row("a fit", ESTIMATE)
    assert (row["name"], row["size"], row["seconds"], row["fge_per_second"]) == (
        "a fit",
        7,
        10.0,
        50.0,
    )


def test_over_keys_the_variances_are_means_and_the_first_call_has_no_rate():
    llcs, errors = np.array([9.0, 10.0, 12.0]), np.array([1.0, 2.0, 1.0])
    works, seconds = np.array([400.0, 800.0, 800.0]), np.array([100.0, 2.0, 4.0])
    found = language_model.over_keys(llcs, errors, works, seconds, 100, {"llc": 10.0})
    assert found["work_normalized_variance"] == pytest.approx((400 + 3200 + 800) / 3)
    assert found["relative_wnmse"] == pytest.approx((0.01 * 4 + 0.04 * 8) / 3)
    assert found["fge_per_second"] == pytest.approx((4 + 2) / 2)


def test_keys_of_the_same_quality_pass_the_gate_and_noise_seldom_trips_it():
    rng = np.random.default_rng(0)
    tripped = 0
    for _ in range(20):
        rows = [
            row
            for date in ("1", "2")
            for number in range(50)
            for row in rows_of(date, rng.chisquare(3, 2) / 3, problem=str(number))
        ]
        tripped += any(verdict == "worse" for verdict, *_ in verdicts(rows).values())
    assert tripped <= 1


def test_the_gate_sees_a_variance_that_rose_on_every_problem():
    rng = np.random.default_rng(0)
    rows = [
        row
        for date, factor in (("1", 1.0), ("2", 4.0))
        for number in range(50)
        for row in rows_of(date, factor * rng.chisquare(3, 2) / 3, problem=str(number))
    ]
    found = verdicts(rows)
    verdict, factor, bound = found["relative_wnv", "all 50 together"]
    assert verdict == "worse"
    assert 2.5 < factor < 6
    assert bound == pytest.approx(2.15, abs=0.01)
    assert sum(one[0] == "ok" for one in found.values()) > 40  # one by one nobody can tell


@pytest.mark.parametrize(
    ("column", "keys", "bound"), [("relative_wnv", 5, 11), ("relative_wnmse", 5, 68)]
)
def test_one_estimate_is_judged_by_what_its_keys_can_tell(column, keys, bound):
    for factor, verdict in ((0.9 * bound, "ok"), (1.1 * bound, "worse"), (math.nan, "worse")):
        rows = rows_of("1", [2.0] * keys, column=column)
        rows += rows_of("2", [2.0 * factor] * keys, column=column)
        [(found, _, allowed)] = verdicts(rows).values()
        assert (found, round(allowed)) == (verdict, bound)


def test_a_row_of_several_keys_counts_as_so_many():
    same = {"method": "fastvi 2000", "nbeta": "1", "gamma": "1"}
    rows = rows_of("1", [2.0], keys="5", **same) + rows_of("2", [2.0], keys="5", **same)
    rows += rows_of("1", [2.0], keys="5", **{**same, "method": "sgld"})
    rows += rows_of("2", [2000.0], keys="5", **{**same, "method": "sgld"})  # not ours to judge
    [(verdict, factor, bound)] = verdicts(rows, table="language_model").values()
    assert (verdict, factor, round(bound)) == ("ok", 1.0, 11)


@pytest.mark.parametrize(("rates", "verdict"), [((1.0, 40.0), "ok"), ((1.0, 38.0), "worse")])
def test_of_rates_the_best_key_is_judged_within_the_load(rates, verdict):
    rows = rows_of("1", [100.0, 3.0], column=gate.RATE) + rows_of("2", rates, column=gate.RATE)
    [(found, factor, bound)] = verdicts(rows).values()
    assert (found, bound) == (verdict, 2.6)
    assert factor == pytest.approx(100 / rates[1])


def test_estimates_are_compared_with_the_last_sound_run_of_the_same_machine():
    old = rows_of("0", [1.0] * 5) + rows_of("1", ["nan"] * 5)
    judged = rows_of("2", [1.5] * 5)
    assert [one[:2] for one in verdicts(old + judged).values()] == [["ok", 1.5]]
    assert verdicts(old + judged, date="0") != {}
    elsewhere = [{**row, "cpu": "b"} for row in rows_of("1", [1.0] * 5)]
    before_the_column = [{"problem": "p", "date": "1", **MACHINE}]
    empty = rows_of("1", [""])
    for earlier in ([], elsewhere, before_the_column, empty):
        assert [one[0] for one in verdicts(earlier + judged).values()] == ["new"]
    assert verdicts(old, date="2") == {}


def test_the_gate_ends_with_an_error_where_an_estimate_became_worse(monkeypatch, tmp_path, capsys):
    committed, own = tmp_path / "results", tmp_path / "runs"
    monkeypatch.setattr(gate, "RESULTS", committed)
    monkeypatch.setattr(gate, "RUNS", own)
    assert gate.main([]) == 1  # nothing to judge
    for folder, date, value in ((committed, "1", 1.0), (own, "2", 1000.0)):
        folder.mkdir()
        lines = rows_of(date, [value] * 5)
        text = "\n".join([",".join(lines[0]), *(",".join(row.values()) for row in lines)])
        (folder / "suite.csv").write_text(text + "\n")
    assert gate.main([]) == 1
    assert "worse  suite" in capsys.readouterr().out
    assert gate.main(["--date", "1"]) == 0  # of which nothing is known


def test_the_table_takes_the_last_run_and_the_median_over_problems(monkeypatch):
    rows = rows_of("1", [9.0, 9.0], problem="a") + rows_of("2", [1.0, 3.0], problem="a")
    rows += rows_of("1", [4.0], problem="b") + rows_of("1", [6.0], problem="c")
    rows += rows_of("1", [5.0], column=gate.RATE, problem="c")
    monkeypatch.setattr(report, "load", lambda table: rows if table == "suite" else [])
    assert report.estimates().split("\n")[2:] == ["| suite |  | 3 | 4 |  | 5 |"]


def test_a_column_that_no_row_of_the_last_run_has_is_left_out(monkeypatch):
    row = {"problem": "p", "key": "0", "right": "1", "llc": "1", "llc_sem": "0.1", "fge": "3"}
    row |= {"seconds": "2", "jax": "0", "commit": "c", "date": "2026-01-01", **MACHINE}
    monkeypatch.setattr(report, "load", lambda table: [row])
    assert "FGE/s" not in report.last_run("gpu_estimates")
    row |= {"fge_per_second": "1.5", "relative_wnv": ""}
    table = report.last_run("gpu_estimates")
    assert "| FGE | FGE/s | s |" in table
    assert "| 3 | 1.5 | 2 |" in table
