"""Compare the latest run with those before it: python -m bench.gate [--allow 1.3].

Runs of this machine (bench/runs) count beside the committed rows (bench/results), and only runs on
the same kind of device and processor are compared.

Of timings ratios are compared, never seconds. A row fails when its 20 % point lies above the
earlier rows' 80 % point times `--allow`. Of estimates the columns of `JUDGED` are compared, each as
a factor on what it was. It fails beyond `--allow` times what chance alone brings about. Without an
earlier row there is nothing to compare, and that is said.
"""

import argparse
import collections
import csv
import math
import sys
from typing import NamedTuple

import numpy as np
from scipy.special import polygamma

from bench.harness import RESULTS, RUNS

ALLOWED = 1.3  # runs of the same code on a shared machine differ by as much
MACHINE = ("device", "cpu", "cores")

# Columns of estimates that are judged, and how well one key knows each. A stated variance is that
# of four chains: a chi-square of three degrees of freedom. The logarithms of those of compare.csv
# differ between keys by 0.4 to 0.8 where that says 0.97. A real squared error has one degree.
FREEDOM = {"relative_wnv": 3, "relative_wnmse": 1}
RATE = "fge_per_second"
JUDGED = (*FREEDOM, RATE)
# Standard errors that a variance may be off. A run of the suite has a hundred to judge, and the
# logarithm of a chi-square has longer tails than a normal.
DEVIATIONS = 4.0
# Beside `--allow`, for rates: the best of three keys of the same program differed by up to 1.6
# between runs while the load average went from 2 to 8. The compared rows of one table were
# measured under the same load, so that many of them make this factor no smaller.
LOADED = 2.0


class Estimates(NamedTuple):
    """What the rows of a table must agree in to be of one estimate.

    Attributes:
        same: Columns, beside those of the machine.
        method: The column that says whose a row is, where other packages have rows too.
    """

    same: tuple[str, ...]
    method: str = ""


ESTIMATES = {
    "estimates": Estimates(("name", "size")),
    "suite": Estimates(("problem",)),
    "compare": Estimates(("problem", "knob"), "method"),
    "language_model": Estimates(("method", "nbeta", "gamma"), "method"),
    "gpu_language_model": Estimates(("method", "nbeta", "gamma"), "method"),
    "gpu_estimates": Estimates(("problem",)),
    "precision": Estimates(("problem", "precision")),
    "gpu_precision": Estimates(("problem", "precision")),
    "flow_bias": Estimates(("family", "posterior")),
    "flow_quadratic": Estimates(("backend", "template", "d_latent")),
    "flow_seeds": Estimates(("posterior", "seeds")),
}


class Measured(NamedTuple):
    """A column over the keys of a run: the mean, of a rate the best; and the number of keys."""

    value: float
    keys: int


def load(folder=RESULTS, table="ratios"):
    """Return the rows of a folder, oldest first; the committed ones if none is named."""
    path = folder / f"{table}.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def identity(row):
    """Return what must agree for two rows to be comparable."""
    return tuple(row[column] for column in ("group", "name", "size", "floor", *MACHINE))


def compare(rows, date, allowed):
    """Return (identity, verdict, ratio, bound) for every row of the run at `date`."""
    results = []
    for row in rows:
        if row["date"] != date or row["asked"] == "":
            continue
        earlier = [old for old in rows if old["date"] < date and identity(old) == identity(row)]
        if not earlier:
            results.append((identity(row), "new", float(row["ratio"]), float("nan")))
            continue
        bound = allowed * float(earlier[-1]["ratio_p80"])
        verdict = "slower" if not float(row["ratio_p20"]) <= bound else "ok"
        results.append((identity(row), verdict, float(row["ratio"]), bound))
    return results


def measured(table, rows, column):
    """Return what each run found of a column, by estimate and date; other packages left out."""
    same, method = ESTIMATES[table]
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in rows:
        # rows of before there was the column have none, or an empty cell
        if row.get(column, "") == "" or (method and not row[method].startswith("fastvi")):
            continue
        name = tuple(row[part] for part in (*same, *MACHINE))
        found[name][row["date"]].append((float(row[column]), int(row.get("keys", 1))))
    return {
        name: {date: _over_keys(column, own) for date, own in dates.items()}
        for name, dates in found.items()
    }


def _over_keys(column, values):
    found, keys = np.array(values).T
    # the least time counts, as in every benchmark, so that other programs and first calls do not
    value = found.max() if column == RATE else np.average(found, weights=keys)
    return Measured(float(value), int(keys.sum()))


def compare_estimates(table, rows, date, allowed):
    """Return (identity, verdict, factor, bound) for the estimates of the run at `date`.

    The factor is that on the earlier run of the same estimate, above 1 where it became worse.
    Those of one column are judged together too, by their geometric mean. Chance moves that less:
    it sees what a single problem hides.
    """
    results = []
    for column in JUDGED:
        pairs = []
        for name, runs in measured(table, rows, column).items():
            earlier = [day for day in sorted(runs) if day < date and 0 < runs[day].value < math.inf]
            if date not in runs:
                continue
            label = (table, column, *name)
            if not earlier:
                results.append((label, "new", math.nan, math.nan))
                continue
            pairs.append((runs[date], runs[earlier[-1]]))
            results.append((label, *judge(column, pairs[-1:], allowed)))
        sound = [pair for pair in pairs if 0 < pair[0].value < math.inf]
        if len(sound) > 1:
            label = (table, column, f"all {len(sound)} together")
            results.append((label, *judge(column, sound, allowed)))
    return results


def judge(column, pairs, allowed):
    """Return the verdict on pairs of a new and an earlier `Measured`, their factor and its bound.

    The logarithm of a mean of chi-squares with f degrees in all has the variance trigamma(f / 2).
    """
    with np.errstate(divide="ignore"):
        logs = [np.log(new.value) - np.log(old.value) for new, old in pairs]
    if column == RATE:
        factor, chance = np.exp(-np.mean(logs)), LOADED
    else:
        degrees = [FREEDOM[column] * one.keys for pair in pairs for one in pair]
        spread = math.sqrt(sum(polygamma(1, count / 2) for count in degrees)) / len(pairs)
        factor, chance = np.exp(np.mean(logs)), math.exp(DEVIATIONS * spread)
    bound = allowed * chance
    return "worse" if not factor <= bound else "ok", float(factor), bound


def main(arguments=None):
    """Print the comparison; exit with 1 if anything became slower or worse."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--allow", type=float, default=ALLOWED, help="factor on the earlier 80 %% point"
    )
    parser.add_argument("--date", help="run to judge, as in the column; the latest when left out")
    options = parser.parse_args(arguments)
    tables = {
        table: sorted(load(RESULTS, table) + load(RUNS, table), key=lambda row: row["date"])
        for table in ("ratios", *ESTIMATES)
    }
    dates = [rows[-1]["date"] for rows in tables.values() if rows]
    if not dates:
        print("there are no rows: run pytest bench/ --benchmark-only first")
        return 1
    date = options.date or max(dates)
    timings = compare(tables["ratios"], date, options.allow)
    for (group, name, size, *_), verdict, ratio, bound in timings:
        print(
            f"{verdict:>7}  {group:<9}{name:<24}{size:>9}  ratio {ratio:.3g}, at most {bound:.3g}"
        )
    estimates = [
        found
        for table in ESTIMATES
        for found in compare_estimates(table, tables[table], date, options.allow)
    ]
    for (table, column, *name), verdict, factor, bound in estimates:
        what = " ".join(name[: len(ESTIMATES[table].same)])
        print(f"{verdict:>7}  {table:<19}{what:<33}  {column} x {factor:.3g}, at most {bound:.3g}")
    return int(any(verdict in ("slower", "worse") for _, verdict, *_ in timings + estimates))


if __name__ == "__main__":
    sys.exit(main())
