"""A language model at its users' settings: fastvi beside SGLD and RMSProp-SGLD.

The byte transformer of `bench.problems`, d = 34,432, at three posteriors. SGLD and RMSProp-SGLD run
as their users run them: 4 chains, 200 draws of batches of 64, everything averaged in. The learning
rate of SGLD is 1e-3. That of RMSProp-SGLD is a tenth of it, since gradients here are small and its
preconditioner `1 / (sqrt(mean square) + 0.1)` is near 10. The reference is a long run of this
file's own Langevin dynamics, which shares nothing with the package but the loss: batches of 256,
step 0.2.

python -m bench.language_model                      five keys each, five minutes
python -m bench.language_model --references         the long runs, half an hour
"""

import argparse
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import fastvi
from bench import harness
from bench.problems import byte_transformer, trained_byte_transformer

TABLE = "language_model"
REFERENCES = pathlib.Path(__file__).parent / "results" / "language_model.json"
POSTERIORS = ((30.0, 300.0), (10.0, 100.0), (100.0, 300.0))  # nbeta, gamma
CHAINS, DRAWS, BATCH, RATE, RMSPROP_RATE = 4, 200, 64, 1e-3, 1e-4
BUDGETS = (6000.0, 2000.0)


class Model:
    """The trained model, its loss on flat parameters, and the minibatches."""

    def __init__(self, weights: str | None = None):
        if weights is None:
            self.tree_loss, self.params, (self.tokens,) = trained_byte_transformer()
        else:  # another processor trains to others, and another Python ships other text
            self.tree_loss, shapes, _ = byte_transformer()
            with np.load(weights) as held:
                self.tokens = jnp.asarray(held["tokens"], jnp.int32)
                self.params = ravel_pytree(shapes)[1](jnp.asarray(held["weights"]))
        self.center, unravel = ravel_pytree(self.params)
        self.loss = lambda w, rows: self.tree_loss(unravel(w), (self.tokens[rows],))

    def rows(self, key, size):
        """Draw examples."""
        return jax.random.randint(key, (size,), 0, len(self.tokens))


def sgld(model: Model, nbeta: float, gamma: float, key, *, rmsprop: bool):
    """Return llc and its error as the users compute them, and the seconds of compiling.

    Draws are averaged in from the first on.
    """

    def step(carry, key):
        w, square = carry
        key_rows, key_noise = jax.random.split(key)
        rows = model.rows(key_rows, BATCH)
        loss, slope = jax.value_and_grad(model.loss)(w, rows)
        square = 0.99 * square + 0.01 * slope**2
        rate = RMSPROP_RATE / (jnp.sqrt(square) + 0.1) if rmsprop else RATE
        force = nbeta * slope + gamma * (w - model.center)
        noise = jax.random.normal(key_noise, w.shape)
        w = w - 0.5 * rate * force + jnp.sqrt(rate) * noise
        return (w, square), loss

    def chain(key):
        start = (model.center, jnp.zeros_like(model.center))
        return jax.lax.scan(step, start, jax.random.split(key, DRAWS))[1]

    keys, everything = jax.random.split(key, CHAINS), jnp.arange(len(model.tokens))
    began = time.perf_counter()
    run = jax.jit(lambda keys: jax.lax.map(chain, keys)).lower(keys).compile()
    loss = jax.jit(model.loss).lower(model.center, everything).compile()
    compiling = time.perf_counter() - began
    losses, start = run(keys), loss(model.center, everything)
    llcs = nbeta * (np.asarray(losses, float).mean(axis=1) - float(start))
    return llcs.mean(), llcs.std(ddof=1) / np.sqrt(CHAINS), compiling


def reference(model: Model, nbeta: float, gamma: float, rounds: int = 20):
    """Return llc and its error by a long run: 8 walkers, batches of 256, and the start left out."""
    step_size, friction, walkers, width = 0.2, 2.0, 8, 1 / np.sqrt(gamma + 50)
    kept = np.exp(-step_size / friction)

    def evaluate(x, key):
        rows = model.rows(key, 256)
        loss, slope = jax.value_and_grad(model.loss)(model.center + width * x, rows)
        excess = loss - model.loss(model.center, rows)
        return excess, width * nbeta * slope + gamma * width**2 * x

    def step(carry, key):
        x, p, g = carry
        key_noise, key_rows = jax.random.split(key)
        p = p - 0.5 * step_size * g
        x = x + 0.5 * step_size * p
        p = kept * p + np.sqrt(1 - kept**2) * jax.random.normal(key_noise, p.shape)
        x = x + 0.5 * step_size * p
        excess, g = jax.vmap(evaluate)(x, jax.random.split(key_rows, walkers))
        return (x, p - 0.5 * step_size * g, g), nbeta * excess

    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    keys = jax.random.split(jax.random.key(5), rounds + 3)
    x, p = (jax.random.normal(key, (walkers, model.center.size)) for key in keys[:2])
    g = jax.vmap(evaluate)(x, jax.random.split(keys[2], walkers))[1]
    carry, found = (x, p, g), []
    for key in keys[3:]:
        carry, excess = run(carry, jax.random.split(key, 20))
        found.append(np.asarray(excess, float))
    llcs = np.concatenate(found)[5 * rounds :].mean(axis=0)
    return llcs.mean(), llcs.std(ddof=1) / np.sqrt(walkers)


def over_keys(llcs, errors, works, seconds, n_data: int, known: dict) -> dict[str, float]:
    """Return the mean over keys of `harness.efficiency`; of its rate the median of later keys."""
    runs = zip(llcs, errors, works / n_data, seconds, strict=True)
    columns = [harness.efficiency(*run, n_data, known["llc"]) for run in runs]
    means = {name: float(np.mean([one[name] for one in columns])) for name in columns[0]}
    rates = [one["fge_per_second"] for one in columns[1:] or columns]
    return means | {"fge_per_second": float(np.median(rates))}


def rows_of(model: Model, nbeta: float, gamma: float, keys: int) -> list[dict]:
    """Measure each method with each key; return rows of language_model.csv."""
    known = json.loads(REFERENCES.read_text())[f"{nbeta:g}, {gamma:g}"]
    rows = []
    for name in ("sgld", "rmsprop-sgld", *(f"fastvi {budget:g}" for budget in BUDGETS)):
        found = []
        for seed in range(keys):
            began = time.perf_counter()
            if name.startswith("fastvi"):
                result = fastvi.estimate_llc(
                    model.tree_loss,
                    model.params,
                    (model.tokens,),
                    nbeta=nbeta,
                    localization=gamma,
                    budget=float(name.split()[1]),
                    key=seed,
                    progress=False,
                )
                llc, error = result.llc, result.llc_sem
                work = result.work.total_fge * result.n_data
                compiling = result.timings.compile
            else:
                key = jax.random.key(seed)
                llc, error, compiling = sgld(model, nbeta, gamma, key, rmsprop="rmsprop" in name)
                work = CHAINS * DRAWS * BATCH
            found.append((llc, error, work, time.perf_counter() - began, compiling))
        llcs, errors, works, seconds, compiling = np.array(found).T
        off = llcs - known["llc"]
        rows.append(
            {
                "method": name,
                "nbeta": nbeta,
                "gamma": gamma,
                "keys": keys,
                "reference": known["llc"],
                "llc": np.median(llcs),
                "median_error_percent": 100 * np.median(np.abs(off)) / known["llc"],
                "stated_error_percent": 100 * np.median(errors) / known["llc"],
                "within_two": int(np.sum(np.abs(off) < 2 * np.hypot(errors, known["sem"]))),
                "sample_gradients": np.max(works),
                "first_s": seconds[0],
                "other_s": np.median(seconds[1:]),
                **over_keys(llcs, errors, works, seconds - compiling, len(model.tokens), known),
            }
        )
    return rows


def main(arguments: list[str]) -> None:
    """Run the comparison, or the long runs that it is against."""
    parser = argparse.ArgumentParser(prog="python -m bench.language_model")
    parser.add_argument("--references", action="store_true")
    parser.add_argument("--keys", type=int, default=5)
    parser.add_argument("--weights", help="those that --save has written, in place of training")
    parser.add_argument("--save", help="write the trained weights and text to a .npz, and end")
    asked = parser.parse_args(arguments)
    model = Model(asked.weights)
    if asked.save is not None:
        np.savez_compressed(asked.save, weights=model.center, tokens=np.uint8(model.tokens))
        return
    if asked.references:
        known = {
            f"{nbeta:g}, {gamma:g}": dict(
                zip(("llc", "sem"), map(float, reference(model, nbeta, gamma)), strict=True)
            )
            for nbeta, gamma in POSTERIORS
        }
        REFERENCES.write_text(json.dumps(known, indent=2) + "\n")
        return
    rows = [row for nbeta, gamma in POSTERIORS for row in rows_of(model, nbeta, gamma, asked.keys)]
    harness.record(TABLE if jax.default_backend() == "cpu" else f"gpu_{TABLE}", rows)
    print(harness.as_text(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
