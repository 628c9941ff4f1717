"""Write the tables of README.md and docs anew from bench/results: python -m bench.report [--check].

Between the lines `<!-- bench:NAME -->` and `<!-- /bench:NAME -->` of a page stands what a function
of TABLES returns. With --check nothing is written; the exit status says whether a page is out of
date.
"""

import functools
import pathlib
import re
import sys
import textwrap

import numpy as np

from bench import flow_report
from bench.gate import MACHINE, load, measured
from bench.harness import RESULTS
from bench.tables import EFFICIENCY, markdown, number, tabulate
from bench.truth import compare_report, precision, suite

ROOT = RESULTS.parent.parent
DOCS = ("benchmarks.md", "accuracy.md", "kernels.md", "flows.md", "vi_flow.md")
PAGES = (*(ROOT / "docs" / name for name in DOCS), ROOT / "README.md")
SCALED_TO = 1e8  # parameters


def latest(rows):
    """Keep the last row of everything measured on the machine of the last row."""
    if not rows:
        return []
    machine = [rows[-1][column] for column in ("device", "cpu", "cores")]
    kept = {}
    for row in rows:
        if [row[column] for column in ("device", "cpu", "cores")] == machine:
            kept[row["group"], row["name"], row["size"], row["floor"]] = row
    return list(kept.values())


def ratios(*groups):
    """Tabulate ratios with their spread, asked values and bytes."""
    header = [
        "",
        "size",
        "multiple of",
        "measured",
        "20 to 80 %",
        "least",
        "asked",
        "ms",
        "MB moved",
        "least MB",
        "peak MB",
    ]
    lines = []
    for row in latest(load()):
        if row["group"] not in groups:
            continue
        spread = f"{number(row['ratio_p20'])} to {number(row['ratio_p80'])}"
        cells = (
            row[name] for name in ("ratio_least", "asked", "ms", "moved_mb", "least_mb", "peak_mb")
        )
        lines.append(
            [
                row["name"],
                number(row["size"]),
                row["floor"],
                number(row["ratio"]),
                spread,
                *map(number, cells),
            ]
        )
    return tabulate(header, lines)


def speed():
    """Tabulate the step for the README, one line a dimension; None leaves what is there."""
    rows = [row for row in latest(load()) if row["group"] == "step" and row["floor"] == "gradient"]
    if not rows:
        return None
    names = [name for name in dict.fromkeys(row["name"] for row in rows) if name != "gradient"]
    found = {(row["size"], row["name"]): number(row["ratio_least"]) for row in rows}
    sizes = sorted({row["size"] for row in rows}, key=int)
    return markdown(
        ["d", *names],
        [[number(size), *(found.get((size, name), "") for name in names)] for size in sizes],
    )


def scale():
    """Tabulate time and memory of a step, and the line through zero that fits the larger half."""
    rows = sorted(
        (row for row in latest(load()) if row["group"] == "scale"), key=lambda row: int(row["size"])
    )
    if not rows:
        return "Nothing measured yet."
    found = np.array([[float(row[name]) for name in ("size", "ms", "peak_mb")] for row in rows])
    dims, each = found[:, 0], found[:, 1:] * 1e6 / found[:, :1]  # ns and bytes a parameter
    lines = [
        [number(dim), number(ms), number(ns), number(mb), number(size)]
        for (dim, ms, mb), (ns, size) in zip(found, each, strict=True)
    ]
    table = markdown(["d", "ms a step", "ns a parameter", "peak MB", "bytes a parameter"], lines)
    large = found[len(found) // 2 :]
    slopes = large[:, 0] @ large[:, 1:] / (large[:, 0] @ large[:, 0]) * 1e6
    spread = np.max(np.abs(each[len(found) // 2 :] / slopes - 1), axis=0)
    law = (
        f"Lines through zero for d from {number(dims[len(found) // 2])} on: {number(slopes[0])} ns "
        f"a parameter (points within {100 * spread[0]:.0f} %) and {number(slopes[1])} bytes "
        f"(within {100 * spread[1]:.1g} %). At d = 1e8 that is {slopes[0] * SCALED_TO / 1e9:.2g} s "
        f"a step and {slopes[1] * SCALED_TO / 1e9:.3g} GB for a chain."
    )
    return f"{table}\n\n{law}"


LANGUAGE_MODEL = {
    "method": "method",
    "nbeta": "nbeta",
    "gamma": "gamma",
    "long run": "reference",
    "llc": "llc",
    "error, %": "median_error_percent",
    "stated, %": "stated_error_percent",
    "keys": "keys",
    "within two": "within_two",
    "sample gradients": "sample_gradients",
    "variance x sample gradients": "work_normalized_variance",
    **EFFICIENCY,
    "s": "other_s",
}
MEASURED_COLUMNS = {
    "gpu": {
        "kernel": "kernel",
        "implementation": "implementation",
        "d": "dim",
        "multiple of a pass": "ratio",
        "20 %": "ratio_p20",
        "80 %": "ratio_p80",
        "us": "us",
        "GB/s": "gb_per_s",
        "a pass, GB/s": "pass_gb_per_s",
        "largest error": "error",
    },
    "gpu_steps": {
        "": "group",
        "step": "name",
        "d": "size",
        "multiple of": "floor",
        "measured": "ratio",
        "of a copy": "of_copy",
        "of the step by XLA": "of_xla",
        "ms": "ms",
        "peak MB": "peak_mb",
    },
    "gpu_numbers": {
        "kernel": "kernel",
        "implementation": "implementation",
        "d": "dim",
        "beside": "reference",
        "largest error": "error",
        "allowed": "allowed",
    },
    "gpu_copies": {"copy": "copy", "bytes": "bytes", "us": "us", "GB/s": "gb_per_s"},
    "gpu_precision": {
        "problem": "problem",
        "precision": "precision",
        "right": "reference",
        "llc": "llc",
        "stated error": "sem",
        "z": "z",
        "findings": "findings",
        "s": "seconds",
    },
    "language_model": LANGUAGE_MODEL,
    "gpu_language_model": LANGUAGE_MODEL,
    "gpu_estimates": {
        "problem": "problem",
        "key": "key",
        "right": "right",
        "llc": "llc",
        "stated error": "llc_sem",
        "FGE": "fge",
        "variance x sample gradients": "work_normalized_variance",
        **EFFICIENCY,
        "s": "seconds",
    },
}


def last_run(name):
    """Tabulate the rows of the last device and commit, and say where.

    A column that none of them has, as of before it was measured, is left out.
    """
    rows = load(table=name)
    if not rows:
        return "Nothing measured yet."
    last = rows[-1]
    run = [row for row in rows if all(row[name] == last[name] for name in ("device", "commit"))]
    columns = {
        head: column
        for head, column in MEASURED_COLUMNS[name].items()
        if any(row.get(column, "") != "" for row in run)
    }
    lines = [[_cell(row[column]) for column in columns.values()] for row in run]
    where = f"{last['device']}, jax {last['jax']}, {last['date'][:10]}, commit {last['commit']}."
    return f"{markdown(list(columns), lines)}\n\n{where}"


def estimates():
    """Tabulate what the errors of estimates cost: the median over problems, by table and kind.

    A problem counts by the last run on the machine of the table's last row.
    """
    lines = []
    for table, kind in ESTIMATES.items():
        rows = load(table=table)
        here = [row for row in rows if all(row[part] == rows[-1][part] for part in MACHINE)]
        found = {
            column: _by_kind(measured(table, here, column), kind) for column in EFFICIENCY.values()
        }
        for name in dict.fromkeys(name for values in found.values() for name in values):
            values = [own.get(name, []) for own in found.values()]
            medians = (f"{np.median(own):.3g}" if own else "" for own in values)
            lines.append([table, name, str(max(map(len, values))), *medians])
    return tabulate(["rows", "", "problems", *EFFICIENCY], lines)


ESTIMATES = {  # which of the columns that name an estimate names its kind
    "estimates": 0,
    "suite": None,
    "flow_bias": 0,
    "flow_quadratic": 0,
    "flow_seeds": None,
}


def _by_kind(found, kind):
    """Return the values of the last runs by kind."""
    values = {}
    for name, runs in found.items():
        own = values.setdefault("" if kind is None else name[kind], [])
        own.append(runs[max(runs)].value)
    return values


def _cell(text):
    try:
        return number(text)
    except ValueError:
        return text


def machine():
    """Say where and when."""
    rows = load()
    if not rows:
        return ""
    row = rows[-1]
    loads = [float(other["load_average"]) for other in latest(rows)]
    return (
        f"{row['cpu']}, {row['cores']} cores, jax {row['jax']}, {row['date'][:10]}, commit "
        f"{row['commit']}; load average {min(loads):.0f} to {max(loads):.0f} on these cores while "
        "it ran (0 would be an idle machine)."
    )


TABLES = {
    "machine": machine,
    "speed": speed,
    "step": lambda: ratios("step"),
    "walkers": lambda: ratios("walkers"),
    "kernels": lambda: ratios("kernels"),
    "peers": lambda: ratios("peers"),
    "scale": scale,
    "fit": lambda: ratios("fit", "estimate"),
    "suite": lambda: suite.table(suite.load()),
    "precision": lambda: precision.table(precision.load()),
    "scaling": lambda: suite.scaling_table(suite.load()),
    "comparison": lambda: compare_report.brief(compare_report.Results()),
    "comparison-details": lambda: compare_report.details(compare_report.Results()),
    "variational": lambda: compare_report.variational(compare_report.Results()),
    "elbo": lambda: ratios("elbo"),
    "estimates": estimates,
    **{name: functools.partial(last_run, name) for name in MEASURED_COLUMNS},
    **flow_report.TABLES,
}


def filled(text):
    """Return the page with every marked table replaced."""
    for name, table in TABLES.items():
        if f"<!-- bench:{name} -->" not in text:
            continue
        pattern = re.compile(rf"(<!-- bench:{name} -->\n).*?(<!-- /bench:{name} -->)", re.DOTALL)
        body = table()
        if body is not None:
            body = "\n".join(map(_wrapped, body.split("\n")))
            text = pattern.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)
    return text


def _wrapped(line):
    """Break a line of prose as the pages are broken."""
    return line if line.startswith(("|", "#")) else textwrap.fill(line, 100, break_long_words=False)


def main(arguments):
    """Rewrite the pages, or say which are out of date."""
    stale = []
    for page in map(pathlib.Path, PAGES):
        old = page.read_text()
        new = filled(old)
        if new == old:
            continue
        stale.append(page.name)
        if "--check" not in arguments:
            page.write_text(new)
    if "--check" not in arguments:
        compare_report.draw_figure(compare_report.Results())
    print(
        ("out of date: " if "--check" in arguments else "rewritten: ")
        + (", ".join(stale) or "nothing")
    )
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
