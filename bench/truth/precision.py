"""Estimates around models that compute in few digits: python -m bench.truth.precision.

python -m bench.truth.precision                              a short suite, two seeds
python -m bench.truth.precision --problems tanh_3_g10        these
python -m bench.truth.precision --precisions bfloat16        these precisions

The answers are those of exact models. A precision is how the model computes:

- float32: with all digits;
- bfloat16: parameters and inputs are cast to bfloat16, and the forward pass computes in it; targets
  stay as they are, losses of examples are summed in float32;
- tensorfloat32: products of single precision of 11 bits, by `jax_default_matmul_precision`. They
  are those of a GPU: elsewhere jax ignores it, and nothing is run.

With BENCH_KEEP=1 rows are appended to bench/results/precision.csv, on a GPU to gpu_precision.csv.
"""

import argparse
import csv
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import harness
from bench.tables import markdown, number
from bench.truth import suite
from bench.truth.problem import Problem
from bench.truth.problems import PROBLEMS
from bench.truth.reference import load_reference

TABLE = "precision"
# of every kind of model one that takes seconds
SHORT = (
    "quadratic_d50_c100",
    "least_squares_20",
    "crossing_2",
    "sphere_10_g100",
    "deep_linear_2x5_g10",
    "deep_linear_10_rank0_g10",
    "deep_linear_3x18_g10",
    "two_unit_linear_50_50_g10",
    "reduced_rank_10_10_10_g10",
    "tanh_3_g10",
    "relu_realizable_4_g1",
    "digits_16_g1",
    "superposition_5gon_g10",
    "quadratic_units_data_g10",
    "softmax_30_g1",
    "factorization_8_7_g1",
    "conv_digits_g100",
    "tokens_g1",
)
# findings that say that few digits show in the estimate
OF_ROUNDING = ("coarse_numbers", "rounded_loss", "rounded_products")


def in_bfloat16(problem: Problem) -> Problem:
    """Return the problem with a model that computes in bfloat16, its losses summed in float32."""

    def loss_fn(params, batch):
        narrow = _narrow(params)
        if not isinstance(batch, tuple):
            # One loss for all examples, as the data are not looked at. One for each would be copies
            # of it, and the backward pass would sum as many equal slopes in bfloat16.
            return problem.loss_fn(narrow, batch).astype(jnp.float32)
        inputs, *targets = batch

        def of_example(inputs, targets):
            one = jax.tree_util.tree_map(lambda leaf: leaf[None], (_narrow(inputs), *targets))
            return problem.loss_fn(narrow, one)

        losses = jax.vmap(of_example)(inputs, tuple(targets))
        return jax.tree_util.tree_map(lambda leaf: leaf.astype(jnp.float32), losses)

    return dataclasses.replace(problem, loss_fn=loss_fn)


def _narrow(tree: Any) -> Any:
    def narrow(leaf: Any) -> Any:
        return leaf.astype(jnp.bfloat16) if leaf.dtype.kind == "f" else leaf

    return jax.tree_util.tree_map(narrow, tree)


def _with_products(name: str, problem: Problem, **options: Any) -> Any:
    with jax.default_matmul_precision(name):
        return problem.estimate(**options)


def _bfloat16(problem: Problem, **options: Any) -> Any:
    return _with_products("highest", in_bfloat16(problem), **options)


PRECISIONS: dict[str, Callable[..., Any]] = {
    "float32": functools.partial(_with_products, "highest"),
    "tensorfloat32": functools.partial(_with_products, "tensorfloat32"),
    "bfloat16": _bfloat16,
}


def build(name: str) -> Problem:
    """Build a problem on any device as exactly as its answer was computed."""
    with jax.default_device(jax.devices("cpu")[0]), jax.default_matmul_precision("highest"):
        problem = PROBLEMS[name]()
    on_host = functools.partial(jax.tree_util.tree_map, np.asarray)
    return dataclasses.replace(problem, params=on_host(problem.params), data=on_host(problem.data))


def here() -> tuple[str, ...]:
    """Return the precisions that mean something on this device."""
    is_cpu = jax.default_backend() == "cpu"
    return tuple(name for name in PRECISIONS if not (is_cpu and name == "tensorfloat32"))


def run(name: str, precision: str, seed: int, **options: Any) -> dict[str, Any]:
    """Estimate once; return a row of precision.csv."""
    problem, known = build(name), load_reference(name)
    began = time.perf_counter()
    result = PRECISIONS[precision](problem, seed=seed, **options)
    row = {
        "problem": name,
        "precision": precision,
        "d": problem.dim,
        "gamma": problem.gamma,
        "seed": seed,
        "reference": known["value"],
        "llc": result.llc,
        "sem": result.llc_sem,
        "relative_error": result.llc / known["value"] - 1,
        "fge": result.work.total_fge,
        "seconds": time.perf_counter() - began,
        "findings": " ".join(finding.name for finding in result.health),
    }
    pull = suite.pull(row, float(known.get("sem") or 0.0))
    return row | {"z": pull} | harness.efficiency_of(result, known["value"])


def measure(
    problems: Iterable[str], precisions: Iterable[str], seeds: Iterable[int]
) -> Iterator[dict[str, Any]]:
    """Estimate each problem in each precision."""
    for name in problems:
        for precision in precisions:
            for seed in seeds:
                yield run(name, precision, seed)


def load() -> dict[str, dict[str, list[dict[str, str]]]]:
    """Return the rows by problem and precision; of rows with the same seed the last one counts."""
    with (harness.RESULTS / f"{TABLE}.csv").open(newline="") as file:
        rows = {
            (row["problem"], row["precision"], row["seed"]): row for row in csv.DictReader(file)
        }
    found: dict[str, dict[str, list[dict[str, str]]]] = {}
    for (name, how, _), row in rows.items():
        found.setdefault(name, {}).setdefault(how, []).append(row)
    return found


def table(found: dict[str, dict[str, list[dict[str, str]]]]) -> str:
    """Return a line for each problem, and how well errors fit in each precision."""
    names = [how for how in PRECISIONS if any(how in own for own in found.values())]
    head = ["problem", "d", "reference"]
    for how in names:
        head += [f"{how}: error", "z"]
    lines = []
    for name in (name for name in PROBLEMS if name in found):
        one = next(iter(found[name].values()))[0]
        cells = [name, one["d"], number(one["reference"])]
        for how in names:
            rows = found[name].get(how, [])
            errors = [f"{100 * float(row['relative_error']):+.2g} %" for row in rows]
            pulls = [f"{float(row['z']):+.1f}{_marks(row)}" for row in rows]
            cells += [", ".join(errors), ", ".join(pulls)]
        lines.append(cells)
    totals = [
        _total(how, [row for own in found.values() for row in own.get(how, [])]) for how in names
    ]
    return "\n".join([markdown(head, lines), "", *totals])


MARKS = {"coarse_numbers": "c", "rounded_loss": "r", "walk_unsettled": "u"}


def _marks(row: dict[str, str]) -> str:
    """Return a letter for each finding that distrusts the number or its error."""
    found = "".join(mark for name, mark in MARKS.items() if name in row["findings"].split())
    return f" ({found})" if found else ""


def _total(how: str, rows: list[dict[str, str]]) -> str:
    trusted = np.array([float(row["z"]) for row in rows if not suite.is_flagged(row)])
    within = [f"{np.sum(np.abs(trusted) < bound)}" for bound in (1, 2, 3)]
    named = sum(any(name in row["findings"].split() for name in OF_ROUNDING) for row in rows)
    return (
        f"{how}: of {len(trusted)} runs that are not flagged {', '.join(within)} lie within one, "
        f"two and three errors, the rms of z is {np.sqrt(np.mean(trusted**2)):.2f} and its mean "
        f"{np.mean(trusted):+.2f}; a finding names rounding in {named} of {len(rows)}."
    )


def main(arguments: list[str]) -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", default=SHORT, choices=PROBLEMS, metavar="NAME")
    parser.add_argument("--precisions", nargs="+", default=here(), choices=here(), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=2)
    settings = parser.parse_args(arguments)
    table = TABLE if jax.default_backend() == "cpu" else f"gpu_{TABLE}"
    for row in measure(settings.problems, settings.precisions, range(settings.seeds)):
        print(
            f"{row['problem']}, {row['precision']}, seed {row['seed']}: {row['llc']:.5g} ± "
            f"{row['sem']:.2g}, {100 * row['relative_error']:+.2f} %, z {row['z']:+.1f}, "
            f"{row['fge']:.0f} FGE, {row['seconds']:.0f} s {row['findings']}",
            file=sys.stderr,
            flush=True,
        )
        harness.record(table, [row])


if __name__ == "__main__":
    main(sys.argv[1:])
