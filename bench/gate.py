"""Compare the ratios of the latest run with those before it: python -m bench.gate [--allow 1.3].

Runs of this machine (bench/runs) count beside the committed rows (bench/results).

Ratios alone are compared, never seconds, and only between runs on the same kind of device and
processor. A row fails when its 20 % point lies above the earlier rows' 80 % point times `--allow`.
Without an earlier row there is nothing to compare, and that is said.
"""

import argparse
import csv
import sys

from bench.harness import RESULTS, RUNS

ALLOWED = 1.3  # runs of the same code on a shared machine differ by as much


def load(folder=RESULTS):
    """Return the rows of a folder, oldest first; the committed ones if none is named."""
    path = folder / "ratios.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def identity(row):
    """Return what must agree for two rows to be comparable."""
    return tuple(
        row[column] for column in ("group", "name", "size", "floor", "device", "cpu", "cores")
    )


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


def main(arguments=None):
    """Print the comparison; exit with 1 if anything became slower."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--allow", type=float, default=ALLOWED, help="factor on the earlier 80 %% point"
    )
    parser.add_argument("--date", help="run to judge, as in the column; the latest when left out")
    options = parser.parse_args(arguments)
    rows = sorted(load() + load(RUNS), key=lambda row: row["date"])
    if not rows:
        print("there are no rows of ratios.csv: run pytest bench/ --benchmark-only first")
        return 1
    results = compare(rows, options.date or max(row["date"] for row in rows), options.allow)
    for (group, name, size, *_), verdict, ratio, bound in results:
        print(
            f"{verdict:>7}  {group:<9}{name:<24}{size:>9}  ratio {ratio:.3g}, at most {bound:.3g}"
        )
    return int(any(verdict == "slower" for _, verdict, *_ in results))


if __name__ == "__main__":
    sys.exit(main())
