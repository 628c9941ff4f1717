"""Deep linear networks: the llc of each, beside the learning coefficient that theory has for it.

A network W_L ... W_1 is fitted to a matrix of rank R. At the point where every layer has rank R its
learning coefficient and multiplicity are known in closed form (Aoyagi 2024), far below d/2.

python examples/deep_linear.py --out runs/examples
"""

import argparse
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np

import fastvi

COUNT, COUNTS, LOCALIZATION = 10**4, [10**3, 10**4, 10**5, 10**6], 10.0
# widths, rank, and the llc at these n and localization by Gibbs sampling, which draws each layer
# whole given the others: bench/truth/gibbs.py, with errors below 0.1 %
NETWORKS = [
    ((5, 5, 5), 2, 10.618),
    ((5, 5, 5, 5), 2, 9.551),
    ((5, 5, 5, 5, 5), 2, 8.870),
    ((6, 4, 7, 5), 1, 8.655),
    ((10, 10, 10), 0, 33.83),
    ((18, 18, 18, 18), 6, 126.04),
    ((22, 22, 22), 6, 199.52),
]
FOLLOWED = [((5, 5, 5), 2), ((10, 10, 10), 0)]  # over n
COLORS = ["#0072b2", "#d55e00"]


def learning_coefficient(widths, rank):
    """Return lambda and its multiplicity m (Aoyagi, Neural Networks 172, 2024, theorem 1)."""
    spare = sorted(width - rank for width in widths)
    last = max(i for i in range(1, len(spare)) if sum(spare[: i + 1]) >= i * spare[i])
    kept = spare[: last + 1]
    total = sum(kept)
    rest = total - (math.ceil(total / last) - 1) * last
    pairs = (total**2 - sum(m * m for m in kept)) / 2
    value = rank * (widths[0] + widths[-1] - rank) / 2 + pairs / 2
    value += (rest * (last - rest) - (last - 1) * total**2) / (4 * last)
    return value, rest * (last - rest) + 1


def degenerate_layers(key, widths, rank):
    """Return layers of rank R with singular values 1, each side in its own random basis."""
    keys = jax.random.split(key, len(widths))
    bases = [jax.random.orthogonal(k, n)[:, :rank] for k, n in zip(keys, widths, strict=True)]
    return [above @ below.T for below, above in zip(bases[:-1], bases[1:], strict=True)]


def product(layers):
    """Multiply W_L ... W_1."""
    return functools.reduce(lambda below, above: above @ below, layers)


@functools.cache
def problem(widths, rank):
    """Return the loss and the degenerate point.

    Inputs are white, so that the mean of 1/2 |W x - T x|^2 over them is 1/2 |W - T|^2: the loss
    needs no data.
    """
    layers = degenerate_layers(jax.random.key(0), widths, rank)
    target = product(layers)
    return (lambda layers, _: 0.5 * jnp.sum((product(layers) - target) ** 2)), layers


def estimate(widths, rank, count):
    """Estimate the llc for `count` examples, which enter by n beta = n / log n alone."""
    loss_fn, layers = problem(widths, rank)
    return fastvi.estimate_llc(
        loss_fn,
        layers,
        jnp.zeros((10_000, 1)),
        nbeta=count / math.log(count),
        localization=LOCALIZATION,
        budget=1e7,
        progress=False,
    )


def row_of(widths, rank, count, exact=None):
    """Estimate, and put theory beside it, and what is exact at this n where it is known."""
    result = estimate(widths, rank, count)
    value, multiplicity = learning_coefficient(widths, rank)
    row = {
        "widths": "-".join(map(str, widths)),
        "rank": rank,
        "n": count,
        "parameters": result.dim,
        "theory": value,
        "multiplicity": multiplicity,
        "exact": exact,
        "llc": result.llc,
        "llc_sem": result.llc_sem,
        "z": exact and (result.llc - exact) / result.llc_sem,
        "findings": [finding.name for finding in result.health],
    }
    print(
        f"{row['widths']:>12}  rank {rank}  n {count:.0e}  d/2 {result.dim / 2:5.1f}  theory "
        f"{value:6.2f} (m = {multiplicity})  llc {result.llc:6.2f} ± {result.llc_sem:.2f}"
        + (f"  exact {exact:6.2f}  z {row['z']:+.1f}  " if exact else "  ")
        + f"{result.work.total_fge:.0f} FGE {' '.join(row['findings'])}",
        flush=True,
    )
    return row


def draw(by_network, by_count, path):
    """Plot estimates against theory and what is exact, and their way to theory as n grows."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    theory, exact, llc, sem, count = (
        np.array([row[name] for row in by_network])
        for name in ("theory", "exact", "llc", "llc_sem", "parameters")
    )
    ends = 0.7 * theory.min(), 1.4 * theory.max()
    left.plot(ends, ends, color="0.6", lw=1, label="λ, the limit of many data")
    left.plot(theory, count / 2, "x", color="#d55e00", label="d/2, of a regular model")
    left.plot(theory, exact, "_", ms=12, color="k", label="exact at n = 10⁴, γ = 10")
    left.errorbar(theory, llc, 2 * sem, fmt="o", ms=4, color="#0072b2", label="llc ± 2 errors")
    left.set(xscale="log", yscale="log", xlabel="λ (Aoyagi 2024)", ylabel="llc")
    left.set(title="seven deep linear networks")
    left.legend(frameon=False)
    for name, color in zip(sorted({row["widths"] for row in by_count}), COLORS, strict=False):
        rows = [row for row in by_count if row["widths"] == name]
        counts, values, errors = (
            np.array([row[key] for row in rows]) for key in ("n", "llc", "llc_sem")
        )
        coefficient, multiplicity = rows[0]["theory"], rows[0]["multiplicity"]
        label = f"{name}, λ = {coefficient:g}, m = {multiplicity}"
        scaled = values / coefficient, 2 * errors / coefficient
        right.errorbar(counts, *scaled, fmt="o-", ms=4, color=color, label=label)
        leading = 1 - (multiplicity - 1) / (coefficient * np.log(counts / np.log(counts)))
        right.plot(counts, leading, "--", lw=1, color=color)
    right.set(xscale="log", xlabel="n, examples", ylabel="llc / λ ± 2 errors")
    right.set(title="dashed: 1 - (m - 1) / (λ log nβ)", ylim=(0, 1.1))
    right.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main():
    """Estimate, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", default="runs/examples", type=pathlib.Path, help="folder of figure and numbers"
    )
    parser.add_argument("--quick", action="store_true", help="one small network, to try the script")
    arguments = parser.parse_args()
    networks = NETWORKS[:1] if arguments.quick else NETWORKS
    by_network = [row_of(widths, rank, COUNT, exact) for widths, rank, exact in networks]
    followed = [] if arguments.quick else [(*one, n) for one in FOLLOWED for n in COUNTS]
    by_count = [row_of(*one) for one in followed]
    arguments.out.mkdir(parents=True, exist_ok=True)
    numbers = {"by_network": by_network, "by_count": by_count}
    (arguments.out / "deep-linear.json").write_text(json.dumps(numbers, indent=1) + "\n")
    draw(by_network, by_count, arguments.out / "deep-linear.png")


if __name__ == "__main__":
    main()
