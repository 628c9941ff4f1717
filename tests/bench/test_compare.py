"""The comparison at equal work: what it counts, and that its samplers sample."""

import numpy as np
import pytest

from bench.truth import compare_report, samplers, variational
from bench.truth.compare import estimate
from bench.truth.problems import PROBLEMS
from bench.truth.reference import load_reference
from bench.truth.samplers import Course

NAME = "quadratic_d10_c1"
BUDGET = 400.0


def test_the_first_half_of_the_work_is_left_out():
    energy = np.array([[9.0, 9.0], [9.0, 9.0], [1.0, 3.0], [1.0, 3.0]])
    course = Course(np.array([1.0, 2.0, 3.0, 4.0]), energy, 0.0)
    assert estimate(course, 4.0) == pytest.approx((2.0, 1.0))
    assert np.isnan(estimate(course, 0.5)[0])


def test_a_single_chain_that_was_tuning_has_no_answer_yet():
    energy = np.array([[np.nan], [np.nan], [2.0], [4.0]])
    course = Course(np.array([1.0, 2.0, 3.0, 4.0]), energy, 0.0)
    assert np.isnan(estimate(course, 2.0)[0])
    assert estimate(course, 4.0)[0] == 3.0


def test_of_the_step_sizes_the_one_of_largest_elbo_counts_and_the_budget_is_spent(monkeypatch):
    def compiled(problem, peer, steps, batch):
        def run(rates, keys):
            return (
                np.where(rates == 1e-3, np.nan, 1.0 - abs(np.log(rates / 1e-2))),
                7 * rates,
                rates,
            )

        return run

    monkeypatch.setattr(variational, "_compiled", compiled)
    found = variational.fits(PROBLEMS[NAME](), "numpyro_normal", [3, 5], BUDGET)
    assert set(found) == {3, 5}
    assert found[3].llc == pytest.approx(0.07)
    assert BUDGET - 1 < found[3].fge <= BUDGET


@pytest.mark.slow
@pytest.mark.parametrize("name", variational.PEERS)
def test_every_peer_fits_a_round_gaussian(name):
    problem = PROBLEMS[NAME]()
    fit = variational.fits(problem, name, [0], 700.0)[0]
    log_z = 0.5 * problem.dim * np.log(2 * np.pi / (problem.nbeta + problem.gamma))
    assert log_z - 0.2 < fit.elbo < log_z + 0.05
    assert abs(fit.llc - load_reference(NAME)["value"]) < 0.02 * fit.llc + 3 * fit.sem


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sgld", "hmc"])
def test_a_sampler_spends_its_budget_and_finds_a_round_gaussian(method):
    problem = PROBLEMS[NAME]()
    run, setting = {"sgld": (samplers.sgld, 3e-5), "hmc": (samplers.hmc, 8)}[method]
    course = run(problem, [setting], [0], BUDGET)[setting, 0]
    assert 0.9 * BUDGET < course.fge[-1] <= BUDGET + 1
    llc, sem = estimate(course, course.fge[-1])
    assert abs(llc - load_reference(NAME)["value"]) < 0.05 * llc + 4 * sem


def test_the_readme_has_lines_and_columns_of_the_whole_table():
    results = compare_report.Results()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in compare_report.summary(results).split("\n")
    ]
    at = [rows[0].index(name) for name in compare_report.BRIEF_COLUMNS]
    left = [row for row in rows if row[0] not in compare_report.LEFT_OUT]
    assert len(rows) - len(left) == len(compare_report.LEFT_OUT)
    assert compare_report.brief(results).split("\n") == [
        "| " + " | ".join(row[column] for column in at) + " |" for row in left
    ]
