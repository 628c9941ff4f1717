"""What `forecast_sgld` says of SGLD on a language model, beside what SGLD reports there.

The byte transformer of `bench.language_model`, its settings of SGLD, and its three posteriors: 4
chains of 200 steps on batches of 64 from w*, lr 1e-3, everything averaged in.

python -m bench.sgld_forecast                       four keys each, some ten minutes
"""

import argparse

import jax
import numpy as np

import fastvi
from bench import harness
from bench.language_model import BATCH, CHAINS, DRAWS, POSTERIORS, RATE, Model, sgld

TABLE = "sgld_forecast"
ERROR = 0.01  # of the estimate: half of it takes four times the work, double hides biases of 2 %


def row_of(model: Model, nbeta: float, gamma: float, keys: int) -> dict:
    """Forecast SGLD, and run it with each key."""
    result = fastvi.estimate_llc(
        model.tree_loss,
        model.params,
        (model.tokens,),
        nbeta=nbeta,
        localization=gamma,
        error=ERROR,
        progress=False,
    )
    found = fastvi.forecast_sgld(result, lr=RATE, batch_size=BATCH, num_steps=DRAWS)
    print(found.summary(), flush=True)
    runs = [sgld(model, nbeta, gamma, jax.random.key(seed), rmsprop=False) for seed in range(keys)]
    llcs = np.array([llc for llc, *_ in runs])
    return {
        "nbeta": nbeta,
        "gamma": gamma,
        "keys": keys,
        "llc": result.llc,
        "llc_sem": result.llc_sem,
        "widening": found.widening,
        "heat": found.heat,
        "missing": found.missing,
        "predicted": found.predicted,
        "predicted_sem": found.predicted_sem,
        "sgld": llcs.mean(),
        "sgld_sem": llcs.std(ddof=1) / np.sqrt(keys),
        "quadratic_llc": found.quadratic_llc,
        "chains": CHAINS,
        "forecast_gradients": found.sample_gradients,
    }


def main() -> None:
    """Write the rows of sgld_forecast.csv."""
    parser = argparse.ArgumentParser(prog="python -m bench.sgld_forecast")
    parser.add_argument("--keys", type=int, default=4)
    parser.add_argument("--weights", help="those that bench.language_model has saved")
    asked = parser.parse_args()
    model = Model(asked.weights)
    rows = [row_of(model, *posterior, asked.keys) for posterior in POSTERIORS]
    harness.record(TABLE, rows)
    print(harness.as_text(rows))


if __name__ == "__main__":
    main()
