"""Which training digits move which: Bayesian influence, against wrong labels and deletions.

A tanh network learns digits of which some have a wrong label on purpose. The posterior's draws say
how the weight of each digit moves the loss of each other: - (n beta / n) Cov(loss_i, loss_j). Then
some digits are left out in turn, and the posterior without them is sampled anew.

python examples/influence.py --out runs/examples
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
from sklearn.datasets import load_digits

import fastvi

CLASSES, HIDDEN, COUNT, WRONG, DELETED = 10, 8, 500, 25, 6
STEPS, LR, DECAY, LOCALIZATION = 3000, 1e-2, 1e-3, 10.0
BLUE, ORANGE = "#0072b2", "#d55e00"


def digits():
    """Return images in [0, 1] with labels, some of them wrong, weights of one, and which are."""
    images, labels = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    rows = rng.permutation(len(labels))[:COUNT]
    images, labels, wrong = images[rows] / 16, labels[rows], np.zeros(COUNT, bool)
    wrong[rng.choice(COUNT, WRONG, replace=False)] = True
    labels = np.where(wrong, (labels + rng.integers(1, CLASSES, COUNT)) % CLASSES, labels)
    data = np.float32(images), labels.astype(np.int32), np.ones(COUNT, np.float32)
    return data, wrong


def loss_fn(params, batch):
    """Return the loss of each digit, of cross-entropy and weight decay, and its weight."""
    images, labels, weights = batch
    scores = jnp.tanh(images @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]
    losses = optax.softmax_cross_entropy_with_integer_labels(scores, labels)
    decay = 0.5 * DECAY * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    return losses + decay, weights


def train(data, steps):
    """Descend on all data to a minimum."""
    keys = jax.random.split(jax.random.key(0))
    pixels = data[0].shape[1]
    params = {
        "w1": jax.random.normal(keys[0], (pixels, HIDDEN)) / np.sqrt(pixels),
        "b1": jnp.zeros(HIDDEN),
        "w2": jax.random.normal(keys[1], (HIDDEN, CLASSES)) / np.sqrt(HIDDEN),
        "b2": jnp.zeros(CLASSES),
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(LR, steps))

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            gradient = jax.grad(lambda params: loss_fn(params, data)[0].mean())(params)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]

    return run(params)


def draws_of(params, data, rows, nbeta, draws):
    """Sample the posterior of the weighted digits, and the losses of some rows along it."""
    result = fastvi.estimate_llc(
        loss_fn, params, data, nbeta=nbeta, localization=LOCALIZATION, error=0.05, progress=False
    )
    kept = (data[0][rows], data[1][rows], np.ones(len(rows), np.float32))
    return fastvi.sample_posterior(result, draws, losses={"kept": kept}, progress=False)


def without(params, data, rows, before, nbeta, draws):
    """Leave each row out in turn; return the changes of its own loss, and their errors."""
    changes = []
    for place, row in enumerate(rows):
        weights = data[2].copy()
        weights[row] = 0
        # the loss is a mean over the digits that are left: n beta of each digit stays the same
        nbeta_left = nbeta * (len(weights) - 1) / len(weights)
        found = draws_of(params, (*data[:2], weights), rows, nbeta_left, draws)
        one, other = found.mean("kept"), before.mean("kept")
        sem = np.hypot(one.sem[place], other.sem[place])
        changes.append((one.value[place] - other.value[place], sem))
    return np.array(changes).T


def draw(own, wrong, by_class, tested, path):
    """Plot own influence, deletions beside it, and how classes act on each other."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.7), layout="constrained")
    order = np.argsort(-own)
    ranks = np.arange(1, len(own) + 1)
    left.plot(ranks[~wrong[order]], own[order][~wrong[order]], ".", ms=4, color=BLUE)
    left.plot(ranks[wrong[order]], own[order][wrong[order]], "x", ms=6, color=ORANGE)
    left.legend(["label as given", "label made wrong"], frameon=False)
    left.set(xscale="log", yscale="log", xlabel="rank of the digit")
    left.set(ylabel="minus own influence, nats", title="wrong labels come first")
    predicted, sem, change, change_sem = (
        np.array([row[key] for row in tested]) for key in tested[0] if key != "digit"
    )
    middle.errorbar(predicted, change, 2 * change_sem, 2 * sem, fmt="o", ms=4, color=BLUE)
    ends = np.array([0, 1.1 * max(predicted.max(), change.max())])
    middle.plot(ends, ends, color="0.6", lw=1)
    middle.set(xlabel="influence says, nats", ylabel="deletion does, nats")
    middle.set(title="loss of a digit that is left out")
    limit = np.abs(by_class).max()
    image = right.imshow(by_class, cmap="RdBu_r", vmin=-limit, vmax=limit)
    right.set(xticks=range(CLASSES), yticks=range(CLASSES), xlabel="label whose loss responds")
    right.set(ylabel="label whose weight grows", title="mean influence, millinats")
    figure.colorbar(image, ax=right)
    figure.savefig(path, dpi=110)


def main():
    """Train, draw, delete, print, plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", default="runs/examples", type=pathlib.Path, help="folder of figure and numbers"
    )
    parser.add_argument("--quick", action="store_true", help="few draws, to try the script")
    arguments = parser.parse_args()
    number, deleted = (16, 1) if arguments.quick else (200, DELETED)
    data, wrong = digits()
    params = train(data, STEPS)
    nbeta = COUNT / np.log(COUNT)
    draws = draws_of(params, data, np.arange(COUNT), nbeta, number)
    print(draws.summary())
    influence = draws.influence("kept")
    own, own_sem = -np.diag(influence.value), np.diag(influence.sem)
    found = int(np.sum(wrong[np.argsort(-own)[:WRONG]]))
    by_loss = int(np.sum(wrong[np.argsort(-np.asarray(loss_fn(params, data)[0]))[:WRONG]]))
    print(
        f"of the {WRONG} largest own influences {found} are of wrong labels, by chance "
        f"{WRONG**2 / COUNT:.1f}; of the {WRONG} largest losses {by_loss}"
    )
    labels = data[1]
    off_diagonal = np.where(np.eye(COUNT, dtype=bool), np.nan, influence.value)
    by_class = np.array(
        [
            [
                1000 * np.nanmean(off_diagonal[np.ix_(labels == one, labels == other)])
                for other in range(CLASSES)
            ]
            for one in range(CLASSES)
        ]
    )
    rows = np.argsort(-own)[np.linspace(0, 2 * WRONG, deleted).astype(int)]
    before = draws_of(params, data, rows, nbeta, number)
    changes = without(params, data, rows, before, nbeta, number)
    tested = [
        {
            "digit": int(row),
            "predicted": own[row],
            "predicted_sem": own_sem[row],
            "change": change,
            "change_sem": sem,
        }
        for row, change, sem in zip(rows, *changes, strict=True)
    ]
    for row in tested:
        print(
            f"digit {row['digit']:3}  influence says {row['predicted']:.4f} ± "
            f"{row['predicted_sem']:.4f}  deletion does {row['change']:.4f} ± "
            f"{row['change_sem']:.4f}"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    numbers = {
        "wrong_labels": WRONG,
        "found_by_influence": found,
        "found_by_loss": by_loss,
        "llc": float(draws.llc_estimate.value),
        "llc_sem": float(draws.llc_estimate.sem),
        "deletions": tested,
    }
    (arguments.out / "influence.json").write_text(json.dumps(numbers, indent=1) + "\n")
    draw(own, wrong, by_class, tested, arguments.out / "influence.png")


if __name__ == "__main__":
    main()
