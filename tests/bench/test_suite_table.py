"""What the table of the suite says of stated errors."""

import numpy as np
import pytest

from bench.truth import suite
from bench.truth.reference import load_reference


def rows_of(name, differences, sem=0.1, findings=()):
    """Make rows that are off by so much, each with its findings."""
    reference = load_reference(name)["value"]
    flags = [*findings, *[""] * (len(differences) - len(findings))]
    return [
        {
            "problem": name,
            "d": "10",
            "gamma": "1.0",
            "seed": str(seed),
            "reference": str(reference),
            "llc": str(reference + difference),
            "sem": str(sem),
            "llc_vi": str(reference),
            "relative_error": str(difference / reference),
            "fge": str(100.0 * (seed + 1)),
            "findings": flag,
        }
        for seed, (difference, flag) in enumerate(zip(differences, flags, strict=True))
    ]


def test_the_error_of_the_reference_counts():
    row = rows_of("tanh_3_g1", [0.3])[0]
    assert suite.pull(row, 0.0) == pytest.approx(3)
    assert suite.pull(row, 0.1) == pytest.approx(3 / np.sqrt(2))
    assert np.isnan(suite.pull(row | {"sem": "nan"}, 0.1))
    assert np.isnan(suite.pull(row | {"sem": "0"}, 0.0))


def test_summary_of_stated_errors():
    """Pulls of 0.5, -1.5 and 2.5, and a flagged one of 9, of an exact reference."""
    found = {
        "quadratic_d10_c1": rows_of(
            "quadratic_d10_c1", [0.9, 0.05, -0.15], findings=["stiff walk_unsettled"]
        ),
        "quadratic_d10_c100": rows_of("quadratic_d10_c100", [0.25, 0.25]),
    }
    text = suite.summary(found)
    assert "Of the 4 runs that are not flagged 25 % are within one and 50 % within two" in text
    rms = np.sqrt((0.5**2 + 1.5**2 + 2 * 2.5**2) / 4)
    assert f"rms of z is {rms:.2f}, its mean +1.00" in text
    assert "the largest mean of a problem +2.5 (quadratic_d10_c100)" in text
    assert "20 % of the runs are flagged" in text
    # 0.1 of an llc of 4.892 + 0.25
    assert "median stated error is 1.9 %, the median work 200 FGE" in text
    table = suite.table(found)
    assert table.endswith(text)
    cells = [line.split(" | ") for line in table.splitlines() if "quadratic_d10_c1 " in line][0]
    assert cells[8:10] == ["-0.5", "3 of 3"]


def test_summary_where_every_run_is_flagged():
    found = {"tanh_3_g1": rows_of("tanh_3_g1", [0.1], findings=["walk_unsettled"])}
    assert suite.summary(found).startswith("100 % of the runs are flagged")
    assert "| – | 1 of 1 |" in suite.table(found)
