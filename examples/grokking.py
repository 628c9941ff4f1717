"""Grokking modular addition: accuracy and llc over training, between bounds in closed form.

A network with quadratic activation learns a + b mod p from half of all pairs: it knows these by
heart long before it adds the others rightly. Bounds of the learning coefficient where the training
loss is zero follow from the symmetries of the network and from the rank of its Hessian.

python examples/grokking.py --out runs/examples
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import numpy as np
import optax

import fastvi

P, UNITS, SHARE, SCALE = 17, 36, 0.55, 0.8
LR, DECAY = 2e-3, 1.0
STEPS = [500, 750, 1500, 3000, 5000, 8000, 12_000]
NBETA, LOCALIZATION = 1000.0, 10.0
BLUE, ORANGE, GREEN, PINK = "#0072b2", "#d55e00", "#009e73", "#cc79a7"


def pairs():
    """Return all (a, b, a + b mod p) in random order, cut into training and test."""
    a, b = np.divmod(np.random.default_rng(0).permutation(P * P), P)
    whole, count = (a, b, (a + b) % P), int(SHARE * P * P)
    return tuple(one[:count] for one in whole), tuple(one[count:] for one in whole)


def outputs(params, batch):
    """Return V (A_a + B_b)^2, one number for each sum."""
    return (params["A"][batch[0]] + params["B"][batch[1]]) ** 2 @ params["V"]


def loss_fn(params, batch):
    """Return half the squared distance of each pair's outputs to the one-hot sum."""
    return 0.5 * jnp.sum((outputs(params, batch) - jax.nn.one_hot(batch[2], P)) ** 2, axis=-1)


def accuracy(params, batch):
    """Return the share of pairs that are added rightly."""
    return float(jnp.mean(jnp.argmax(outputs(params, batch), axis=-1) == batch[2]))


def train(data, steps):
    """Descend on all training pairs with weight decay; return the parameters at the steps."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"A": (P, UNITS), "B": (P, UNITS), "V": (UNITS, P)}
    params = {
        name: SCALE * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    params["V"] /= np.sqrt(UNITS)
    optimizer = optax.adamw(LR, b2=0.98, weight_decay=DECAY)

    def step(_, carry):
        params, state = carry
        gradient = jax.grad(lambda params: loss_fn(params, data).mean())(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    run = jax.jit(lambda carry, count: jax.lax.fori_loop(0, count, step, carry))
    carry, kept = (params, optimizer.init(params)), []
    for count in np.diff(steps, prepend=0):
        carry = run(carry, count)
        kept.append(carry[0])
    return kept


def spectrum(params, data):
    """Return the eigenvalues of the Hessian of the training loss."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    hessian = jax.jit(jax.hessian(lambda flat: loss_fn(unravel(flat), data).mean()))(flat)
    return np.linalg.eigvalsh(np.asarray(hessian))


def row_of(step, params, estimate, split, data, test):
    """Put accuracy, llc and what the Hessian says of it side by side."""
    values = spectrum(params, data)
    nbeta, positive = estimate.nbeta, np.maximum(values, 0)
    row = {
        "step": step,
        "accuracy": accuracy(params, data),
        "test_accuracy": accuracy(params, test),
        "loss": estimate.init_loss,
        "llc": estimate.llc,
        "llc_sem": estimate.llc_sem,
        "spread": float(split.spread.value),
        "spread_sem": float(split.spread.sem),
        "quadratic": float(0.5 * np.sum(nbeta * positive / (nbeta * positive + LOCALIZATION))),
        "half_rank": float(0.5 * np.sum(values > 1e-5 * values.max())),
        "fge": estimate.work.total_fge,
        "findings": [finding.name for finding in estimate.health],
    }
    print(
        f"step {step:6}  accuracy {row['accuracy']:.2f}, test {row['test_accuracy']:.2f}  loss "
        f"{row['loss']:.5f}  llc {row['llc']:6.1f} ± {row['llc_sem']:.1f}, spread "
        f"{row['spread']:6.1f} ± {row['spread_sem']:.1f}  of the Hessian {row['quadratic']:6.1f}  "
        f"half its rank {row['half_rank']:5.1f}  {' '.join(row['findings'])}",
        flush=True,
    )
    return row


def draw(rows, upper, path):
    """Plot accuracies above, llc and its bounds below."""
    steps, right, test, spread, sem, quadratic, rank, llc, llc_sem = (
        np.array([row[name] for row in rows])
        for name in (
            *("step", "accuracy", "test_accuracy", "spread", "spread_sem"),
            *("quadratic", "half_rank", "llc", "llc_sem"),
        )
    )
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(7.5, 6), sharex=True, layout="constrained", height_ratios=(1, 1.6)
    )
    above.plot(steps, right, "o-", ms=4, color=BLUE, label="training pairs")
    above.plot(steps, test, "s--", ms=4, color=ORANGE, label="other pairs")
    above.axhline(1 / P, color="0.6", lw=0.8, ls=":")
    above.set(ylabel="share added rightly", title=f"a + b mod {P}, {UNITS} quadratic units")
    above.legend(frameon=False)
    below.errorbar(steps, llc, 2 * llc_sem, fmt="o-", ms=4, color=BLUE, label="llc ± 2 errors")
    below.errorbar(steps, spread, 2 * sem, fmt="^:", ms=4, color=GREEN, label="its spread")
    below.plot(steps, quadratic, "d--", ms=4, lw=1, color=PINK, label="of the Hessian alone")
    below.plot(steps, rank, ":", color="0.3", label="half the Hessian's rank")
    below.axhline(upper, color="k", lw=1, ls="--", label="(d - symmetries) / 2")
    below.set(xlabel="training step", ylabel="llc")
    below.set_xscale("log")
    below.legend(frameon=False, fontsize=8, ncols=2, loc="center", bbox_to_anchor=(0.62, 0.76))
    figure.savefig(path, dpi=120)


def main():
    """Train, estimate, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", default="runs/examples", type=pathlib.Path, help="folder of figure and numbers"
    )
    parser.add_argument("--quick", action="store_true", help="two checkpoints, to try the script")
    arguments = parser.parse_args()
    data, test = pairs()
    steps = [500, 750] if arguments.quick else STEPS
    kept = train(data, steps)
    curve = fastvi.llc_curve(
        loss_fn, kept, data, nbeta=NBETA, localization=LOCALIZATION, error=0.05, progress=False
    )
    rows = [
        row_of(*one, data, test)
        for one in zip(steps, kept, curve.estimates, curve.splits, strict=True)
    ]
    # each unit has two: A + c with B - c, and s A, s B with V / s^2
    upper = (3 * P * UNITS - 2 * UNITS) / 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    numbers = {"parameters": 3 * P * UNITS, "upper_bound": upper, "checkpoints": rows}
    (arguments.out / "grokking.json").write_text(json.dumps(numbers, indent=1) + "\n")
    draw(rows, upper, arguments.out / "grokking.png")


if __name__ == "__main__":
    main()
