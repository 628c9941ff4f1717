"""Measure the answers of `PROBLEMS` and keep them in references.json, one row per problem.

python -m bench.truth.reference                         every problem that is not large
python -m bench.truth.reference crossing_2 digits_16_g1 these
python -m bench.truth.reference --check sphere_10       also compare the exact answer with HMC
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import pathlib
import sys
import time
from typing import Any

from bench.truth.hmc import Recipe, sample
from bench.truth.problem import SIZES, Problem
from bench.truth.problems import PROBLEMS

REFERENCES = pathlib.Path(__file__).parent / "references.json"
# dimensions up to which HMC takes very uneven steps: valleys there are narrow beside their length
FEW = 10
FORMULAS = ("closed form", "quadrature")
PACKAGES = ("jax", "numpy", "scipy")


def load_references() -> dict[str, dict[str, Any]]:
    """Return all rows by name."""
    return json.loads(REFERENCES.read_text()) if REFERENCES.exists() else {}


def load_reference(name: str) -> dict[str, Any]:
    """Return the row of a problem.

    Raises:
        KeyError: If it was not measured.
    """
    rows = load_references()
    if name not in rows:
        raise KeyError(f"no reference of {name!r}: run `python -m bench.truth.reference {name}`.")
    return rows[name]


def measure(
    problem: Problem, recipe: Recipe, *, by_draws: bool, is_checked: bool = False
) -> dict[str, Any]:
    """Find the answer by the best means there is.

    Args:
        problem: What to measure.
        recipe: Settings of HMC.
        by_draws: Whether draws may be made where there is no formula; without, only the theory is
            recorded.
        is_checked: Whether HMC also runs beside an exact answer; its result goes to `hmc_check`.
    """
    row = {
        "dim": problem.dim,
        "n_data": problem.n_data,
        "nbeta": problem.nbeta,
        "gamma": problem.gamma,
        "theory": problem.theory,
        "theory_source": problem.theory_source,
        "size": problem.size,
    }
    if problem.exact is not None and (by_draws or problem.exact_method in FORMULAS):
        value, error = problem.exact()
        row |= {
            "method": problem.exact_method,
            "value": value,
            "sem": error,
            "r_hat": None,
            "converged": True,
        }
        if is_checked:
            row["hmc_check"] = hmc_row(problem, recipe)
    elif by_draws:
        row |= {"method": "hmc", **hmc_row(problem, recipe)}
    else:
        row |= {"method": "theory", "value": None, "sem": None, "r_hat": None, "converged": False}
    return row | {"date": datetime.date.today().isoformat(), "versions": versions()}


def hmc_row(problem: Problem, recipe: Recipe) -> dict[str, Any]:
    """Sample, and say how."""
    if problem.dim <= FEW:
        recipe = dataclasses.replace(recipe, least_step=0.05, target_accept=0.9)
    result = sample(problem, recipe)
    settings = {
        name: getattr(recipe, name) for name in ("chains", "seed", "trajectory", "least_step")
    }
    warm_up = recipe.block * sum(recipe.windows)
    course = {
        name: result.pop(name)
        for name in ("draws", "step", "gradients", "seconds", "accept", "least_accept")
    }
    return {**result, "recipe": {**settings, "warm_up": warm_up, **course}}


def versions() -> dict[str, str]:
    """Return the versions that the numbers depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def write(rows: dict[str, dict[str, Any]]) -> None:
    """Replace the given rows of the file; the order is that of the registry."""
    merged = load_references() | {name: rounded(row) for name, row in rows.items()}
    ordered = {name: merged[name] for name in PROBLEMS if name in merged}
    REFERENCES.write_text(json.dumps(ordered, indent=1) + "\n")


def rounded(value: Any) -> Any:
    """Keep eight digits of every number."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    return float(f"{value:.8g}") if isinstance(value, float) else value


def line(name: str, row: dict[str, Any], seconds: float) -> str:
    """Tell one row."""
    parts = [f"{name:26s} d={row['dim']:<7d} gamma={row['gamma']:<6g} theory={row['theory']}"]
    if row["value"] is None:
        return "  ".join([*parts, "not measured"])
    parts.append(f"{row['method']}: {row['value']:.5g} +- {row['sem']:.2g}")
    measured = row if row["method"] == "hmc" else row.get("hmc_check")
    if measured is not None:
        parts.append(
            f"HMC {measured['value']:.5g} +- {measured['sem']:.2g}, R-hat {measured['r_hat']:.4f}"
        )
        parts.append(f"virial {measured['virial']:.4f} +- {measured['virial_sem']:.4f}")
        parts.append("converged" if measured["converged"] else "NOT CONVERGED")
    return "  ".join([*parts, f"{seconds:.0f} s"])


def main(arguments: list[str]) -> None:
    """Measure the problems asked for, cheapest first."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "names", nargs="*", metavar="name", help="problems; all that are not large when left out"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=Recipe.seconds,
        help="time for HMC on each problem; 0: no draws",
    )
    parser.add_argument("--chains", type=int, default=Recipe.chains, help="parallel chains")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument(
        "--sem",
        type=float,
        default=Recipe.relative_sem,
        help="relative error at which HMC may stop",
    )
    parser.add_argument("--check", action="store_true", help="run HMC beside exact answers too")
    settings = parser.parse_args(arguments)
    unknown = sorted(set(settings.names) - set(PROBLEMS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(PROBLEMS)}")
    recipe = Recipe(
        chains=settings.chains,
        seed=settings.seed,
        seconds=settings.seconds,
        relative_sem=settings.sem,
    )
    problems = [PROBLEMS[name]() for name in settings.names or PROBLEMS]
    for problem in sorted(problems, key=lambda problem: (SIZES.index(problem.size), problem.dim)):
        began = time.monotonic()
        by_draws = settings.seconds > 0 and (bool(settings.names) or problem.size != "large")
        row = measure(problem, recipe, by_draws=by_draws, is_checked=settings.check)
        write({problem.name: row})
        print(line(problem.name, row, time.monotonic() - began), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
