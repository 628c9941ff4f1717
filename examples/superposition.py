"""Superposition: the llc of the polygons that a toy model learns, against their codimension.

Six features, one on at a time, are squeezed into two dimensions: x to ReLU(W^T W x + b). Training
passes from polygon to polygon of features. At each polygon the loss is, in the directions that
change it, of degree two, so that the learning coefficient is half the number of these directions.

python examples/superposition.py --out runs/examples
"""

import argparse
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

FEATURES, LOCALIZATION = 6, 100.0
LR, STEPS, NOISE = 0.05, 24_000, 0.15
CHECKPOINTS = [0, 500, 1000, 1500, 2000, 2500, 3000, 3500, 4000, 6000, 12_000, 24_000]
COUNT, COUNTS = 10**6, [10**4, 10**5, 10**6]
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"]

# name: vertices, how many of the other features are on, and directions that change the loss, of
# 18. Flat are the rotation, and of a feature that is off beside a pentagon its bias and its vector.
# At a square, whose biases are 0, a vertex sees the vector, and only the bias is flat.
POLYGONS = {
    "square, others off": (4, 0, 15),
    "square, one on": (4, 1, 16),
    "square, others on": (4, 2, 17),
    "pentagon, other off": (5, 0, 14),
    "pentagon, other on": (5, 1, 17),
    "hexagon": (6, 0, 17),
}


def loss_fn(params, batch):
    """Return the mean of |x - ReLU(W^T W x + b)|^2 over x = u e_i, u uniform on [0, 1].

    The integral over u is exact: an output is on between 0 or 1 and its root, and misses its input
    by a line there, and by all of it elsewhere. No data are needed.
    """
    eye, bias = jnp.eye(FEATURES), params["b"][:, None]
    slope = params["W"].T @ params["W"]
    at_zero, at_one = bias > 0, slope + bias > 0
    # in single precision the square of a smaller slope is 0, and its gradient not finite
    crosses = (at_zero != at_one) & (jnp.abs(slope) > 1e-12)
    root = -bias / jnp.where(crosses, slope, 1.0)
    low = jnp.where(at_zero, 0.0, jnp.where(at_one, root, 0.0))
    high = jnp.where(at_one, 1.0, jnp.where(at_zero, root, 0.0))
    zeroth, first, second = ((high**power - low**power) / power for power in (1, 2, 3))
    excess = slope - eye
    on = excess**2 * second + 2 * excess * bias * first + bias**2 * zeroth
    return jnp.sum(on + eye * (1 / 3 - second)) / FEATURES


@jax.jit
def descend(params, steps, noise, key):
    """Descend the gradient with noise that falls to 0 by the last step of all."""

    def step(number, params):
        keys = jax.random.split(jax.random.fold_in(key, number))
        draws = {"W": jax.random.normal(keys[0], (2, FEATURES))}
        draws["b"] = jax.random.normal(keys[1], (FEATURES,))
        slopes, level = jax.grad(loss_fn)(params, None), noise * (1 - number / STEPS)
        return jax.tree.map(lambda w, g, x: w - LR * (g + level * x), params, slopes, draws)

    return jax.lax.fori_loop(*steps, step, params)


def settle(params):
    """Descend without noise to the bottom of the valley."""
    return descend(params, (0, 20_000), 0.0, jax.random.key(0))


def polygon(vertices, num_on):
    """Return the minimum beside a regular polygon, found by descent."""
    angles = 2 * np.pi * np.arange(vertices) / vertices
    columns = np.zeros((2, FEATURES))
    columns[:, :vertices] = np.stack([np.cos(angles), np.sin(angles)])
    columns *= 1.0 if vertices == 4 else 1.2
    bias = {4: 0.0, 5: -0.3, 6: -0.6}[vertices]
    others = np.where(np.arange(FEATURES) < FEATURES - num_on, -0.3, 1 / (2 * FEATURES))
    biases = np.where(np.arange(FEATURES) < vertices, bias, others)
    return settle({"W": jnp.float32(columns), "b": jnp.float32(biases)})


def estimate(params, count):
    """Estimate the llc; n enters by n beta = n / log n alone."""
    return fastvi.estimate_llc(
        loss_fn,
        params,
        jnp.zeros((1000, 1)),
        nbeta=count / math.log(count),
        localization=LOCALIZATION,
        error=0.03,
        budget=1e6,
        progress=False,
    )


def numbers_of(result):
    """Return what is kept of an estimate."""
    print(
        f"loss {result.init_loss:.4f}  llc {result.llc:6.2f} ± {result.llc_sem:.2f}  "
        f"{result.work.total_fge:.0f} FGE  {' '.join(finding.name for finding in result.health)}",
        flush=True,
    )
    findings = [finding.name for finding in result.health]
    return {
        "loss": result.init_loss,
        "llc": result.llc,
        "llc_sem": result.llc_sem,
        "findings": findings,
    }


def over_training(checkpoints):
    """Train with noise from a square, and estimate at the bottom of the valley of each checkpoint.

    A checkpoint itself is off the bottom by its noise, which at this n counts more than llc.
    """
    params, rows, done = polygon(4, 0), [], 0
    for step in checkpoints:
        params = descend(params, (done, step), NOISE, jax.random.key(0))
        done, bottom = step, settle(params)
        print(f"step {step:5}  loss {float(loss_fn(params, None)):.4f}, settled to ", end="")
        found = numbers_of(estimate(bottom, COUNT))
        rows.append({"step": step, "loss_before": float(loss_fn(params, None))} | found)
    return rows


def at_polygons(counts, names):
    """Estimate at the polygons, for data sets of several sizes."""
    rows = []
    for name in names:
        vertices, num_on, directions = POLYGONS[name]
        for count in counts:
            print(f"{name:>20}  n {count:.0e}  theory {directions / 2}  ", end="")
            found = numbers_of(estimate(polygon(vertices, num_on), count))
            rows.append({"polygon": name, "n": count, "theory": directions / 2} | found)
    return rows


def draw(trained, rows, path):
    """Plot llc and loss over training, and the way of llc to theory at each polygon."""
    figure = plt.figure(figsize=(9.5, 5), layout="constrained")
    axes = figure.subplot_mosaic([["above", "right"], ["below", "right"]])
    above, below, right = axes["above"], axes["below"], axes["right"]
    steps = [row["step"] for row in trained]
    llc, sem = (np.array([row[key] for row in trained]) for key in ("llc", "llc_sem"))
    above.errorbar(steps, llc, 2 * sem, fmt="o-", ms=4, color=COLORS[0])
    for value in sorted({row["theory"] for row in rows}):
        above.axhline(value, color="0.6", lw=0.8, ls="--")
    above.set(ylabel="llc ± 2 errors", title="training with noise, n = 10⁶", ylim=(5, 10))
    below.plot(
        steps, [row["loss_before"] for row in trained], ".", color="0.6", label="with its noise"
    )
    below.plot(steps, [row["loss"] for row in trained], "ko-", ms=4, label="settled")
    below.legend(frameon=False, fontsize=8)
    losses = {row["polygon"]: row["loss"] for row in rows}
    for name, loss in losses.items():
        below.axhline(loss, color="0.6", lw=0.8, ls="--")
        below.text(steps[-1], loss, name, fontsize=7, ha="right", va="bottom", color="0.3")
    below.set(xlabel="training step", ylabel="loss")
    for axis in (above, below):
        axis.set_xscale("symlog", linthresh=5000)
        axis.set_xticks([0, 2000, 4000, 24_000], ["0", "2,000", "4,000", "24,000"])
    for name, color, marker in zip(losses, [*COLORS, "0.3", "#56b4e9"], "os^Dvx", strict=False):
        of_name = [row for row in rows if row["polygon"] == name]
        counts = np.array([row["n"] for row in of_name])
        values, errors = (np.array([row[key] for row in of_name]) for key in ("llc", "llc_sem"))
        right.errorbar(counts, values, 2 * errors, fmt=marker + "-", ms=4, color=color, label=name)
        right.axhline(of_name[0]["theory"], color=color, lw=1, ls="--")
    right.set(
        xscale="log",
        xlabel="n, examples",
        ylabel="llc ± 2 errors",
        title="at the polygons; dashed: theory",
    )
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)


def main():
    """Estimate at the polygons and along training, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", default="runs/examples", type=pathlib.Path, help="folder of figure and numbers"
    )
    parser.add_argument("--quick", action="store_true", help="one polygon, to try the script")
    arguments = parser.parse_args()
    names = ["pentagon, other off"] if arguments.quick else list(POLYGONS)
    rows = at_polygons([COUNT] if arguments.quick else COUNTS, names)
    trained = over_training(CHECKPOINTS[:1] if arguments.quick else CHECKPOINTS)
    arguments.out.mkdir(parents=True, exist_ok=True)
    numbers = {"at_polygons": rows, "over_training": trained}
    (arguments.out / "superposition.json").write_text(json.dumps(numbers, indent=1) + "\n")
    draw(trained, rows, arguments.out / "superposition.png")


if __name__ == "__main__":
    main()
