"""Does influence say what deleting an example does? Digits, the examples of largest own influence.

Each of them is left out in turn and the posterior is sampled anew, with the same key and the same
minibatches: the weight of an example goes to zero and nbeta / n stays.

python -m bench.deletion                 some ten minutes; BENCH_KEEP=1 keeps the rows
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.stats import spearmanr

import fastvi
from bench import harness
from fastvi.demos import digits

TABLE = "deletion"
LOCALIZATION, DRAWS, DELETED, KEY = 10.0, 1000, 20, 0


def loss_fn(params, batch):
    """Return the cross-entropy of each example, and its weight."""
    images, labels, weights = batch
    scores = jax.nn.log_softmax(digits.logits(params, images))
    return -jnp.take_along_axis(scores, labels[:, None], axis=1)[:, 0], weights


def draws_of(params, data, rows, weights, nbeta):
    """Sample the posterior of the weighted examples; evaluate the losses of some rows."""
    result = fastvi.estimate_llc(
        loss_fn,
        params,
        (*data, weights),
        nbeta=nbeta,
        localization=LOCALIZATION,
        key=KEY,
        progress=False,
    )
    kept = (data[0][rows], data[1][rows], np.ones(len(rows), np.float32))
    return fastvi.sample_posterior(result, DRAWS, losses={"kept": kept}, progress=False)


def means_by_block(draws):
    """Return the mean loss of each row in each block of draws: (blocks, rows)."""
    losses = np.asarray(draws.losses["kept"], float)
    return draws.plain.weights @ losses.reshape(-1, losses.shape[2])


def main() -> None:
    """Predict, delete, and print both."""
    _, params, data = digits.target()
    data = tuple(np.asarray(leaf) for leaf in data)
    count = len(data[1])
    nbeta, ones = count / np.log(count), np.ones(count, np.float32)
    everything = draws_of(params, data, np.arange(count), ones, nbeta)
    predicted = -np.diag(everything.influence("kept").value)
    rows = np.argsort(-predicted)[:DELETED]
    before, table = means_by_block(draws_of(params, data, rows, ones, nbeta)), []
    for place, row in enumerate(rows):
        without = ones.copy()
        without[row] = 0
        after = draws_of(params, data, rows, without, nbeta * (count - 1) / count)
        change = means_by_block(after)[:, place] - before[:, place]
        table.append(
            {
                "example": int(row),
                "predicted": predicted[row],
                "change": change.mean(),
                "change_sem": change.std(ddof=1) / np.sqrt(len(change)),
                "localization": LOCALIZATION,
                "draws": DRAWS,
            }
        )
    harness.record(TABLE, table)
    print(harness.as_text(table))
    found = spearmanr([row["predicted"] for row in table], [row["change"] for row in table])
    print(f"rank correlation {found.statistic:.3f}")


if __name__ == "__main__":
    main()
