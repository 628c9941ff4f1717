"""The llc of a small transformer while it learns unigrams, bigrams and induction, beside SGLD's.

Sequences come from a fixed Markov chain and repeat themselves after 8 to 16 tokens, so that the
losses of what can be learnt are known: log V, the entropy of a token, that of a token given the one
before, and the latter on the first round alone for what copies from the round before.

python examples/transformer_over_training.py --out runs/examples
"""

import argparse
import functools
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

TOKENS, LENGTH, PERIODS, WIDTH, LAYERS = 10, 32, (8, 16), 24, 2
BATCH, LR, LAST, CHECKPOINTS, SEQUENCES = 64, 3e-3, 2000, 14, 2048
NBETA, LOCALIZATION, BUDGET = 100.0, 100.0, 20_000.0
CHAINS = 4  # of SGLD
USUAL = {"rate": 1e-3, "steps": 200, "batch": 64, "left_out": 0}  # as its users run it
LONG = {"rate": 1e-4, "steps": 4000, "batch": 16, "left_out": 800}  # a check, at few checkpoints

CHAIN = np.random.default_rng(0).dirichlet(0.3 * np.ones(TOKENS), TOKENS)
LEVEL = np.linalg.matrix_power(CHAIN, 1000)[0]  # the share of each token
BACK = np.arange(LENGTH)[:, None] - np.arange(LENGTH)


def sample(key, count):
    """Draw sequences of the chain that repeat themselves, and how long a round of each is."""
    key_first, key_rest, key_period = jax.random.split(key, 3)
    first = jax.random.categorical(key_first, jnp.log(LEVEL), shape=(count,))

    def step(token, key):
        token = jax.random.categorical(key, jnp.log(CHAIN)[token])
        return token, token

    rest = jax.lax.scan(step, first, jax.random.split(key_rest, LENGTH))[1]
    period = jax.random.randint(key_period, (count, 1), PERIODS[0], PERIODS[1] + 1)
    tokens = jnp.concatenate([first[None], rest]).T
    return jnp.take_along_axis(tokens, jnp.arange(LENGTH + 1) % period, axis=1), period


def initial_params(key):
    """Draw the weights of two layers of one attention head each."""

    def matrix(key, *shape):
        return jax.random.normal(key, shape) / np.sqrt(shape[0])

    key_in, key_out, *keys = jax.random.split(key, 2 + 4 * LAYERS)
    layers = [
        {name: matrix(key, WIDTH, WIDTH) for name, key in zip("qkvo", some, strict=True)}
        | {"back": jnp.zeros(LENGTH)}  # how much a head looks how far back
        for some in (keys[:4], keys[4:])
    ]
    embed = matrix(key_in, TOKENS, WIDTH) * np.sqrt(TOKENS)
    return {"embed": embed, "layers": layers, "unembed": 0.1 * matrix(key_out, WIDTH, TOKENS)}


def normalize(x):
    """Scale to unit root mean square."""
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def loss_fn(params, sequences):
    """Return the loss of each token that follows, shape (sequences, length)."""
    x = params["embed"][sequences[:, :-1]]
    for layer in params["layers"]:
        q, k, v = (normalize(x) @ layer[name] for name in "qkv")
        scores = q @ k.swapaxes(1, 2) / np.sqrt(WIDTH) + layer["back"][np.abs(BACK)]
        x = x + jax.nn.softmax(jnp.where(BACK >= 0, scores, -jnp.inf)) @ v @ layer["o"]
    log_prob = jax.nn.log_softmax(normalize(x) @ params["unembed"])
    return -jnp.take_along_axis(log_prob, sequences[:, 1:, None], axis=-1)[..., 0]


def train(last, checkpoints):
    """Train on fresh sequences; return the steps of the checkpoints, evenly in log, and these."""
    optimizer = optax.adam(LR)

    @jax.jit
    def step(params, state, key):
        batch = sample(key, BATCH)[0]
        gradient = jax.grad(lambda params: loss_fn(params, batch).mean())(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state

    steps = np.unique(np.geomspace(5, last, checkpoints).astype(int))
    params, kept = initial_params(jax.random.key(0)), []
    state = optimizer.init(params)
    for number in range(1, last + 1):
        params, state = step(params, state, jax.random.key(number))
        if number in steps:
            kept.append(params)
    return steps, kept


@functools.partial(jax.jit, static_argnames=("steps", "batch", "left_out"))
def sgld(params, sequences, key, rate, steps, batch, left_out):
    """Return llc and its error over chains: nbeta (mean loss of the batches - loss at w*).

    w <- w - rate/2 (nbeta grad L_B(w) + gamma (w - w*)) + sqrt(rate) noise, begun at w*.
    """
    center, unravel = jax.flatten_util.ravel_pytree(params)

    def loss(w, batch):
        return loss_fn(unravel(w), batch).mean()

    def step(w, key):
        key_rows, key_noise = jax.random.split(key)
        rows = jax.random.randint(key_rows, (batch,), 0, len(sequences))
        value, slope = jax.value_and_grad(loss)(w, sequences[rows])
        force = NBETA * slope + LOCALIZATION * (w - center)
        noise = jax.random.normal(key_noise, w.shape)
        return w - 0.5 * rate * force + jnp.sqrt(rate) * noise, value

    def chain(key):
        return jax.lax.scan(step, center, jax.random.split(key, steps))[1][left_out:].mean()

    means = jax.vmap(chain)(jax.random.split(key, CHAINS))
    llcs = NBETA * (means - loss(center, sequences))
    return llcs.mean(), llcs.std(ddof=1) / jnp.sqrt(CHAINS)


def row_of(step, params, sequences, is_copy, long):
    """Return the losses of one checkpoint, llc with its parts, and what SGLD says."""
    posterior = {"nbeta": NBETA, "localization": LOCALIZATION, "budget": BUDGET}
    result = fastvi.estimate_llc(loss_fn, params, sequences, **posterior, progress=False)
    split, losses = fastvi.split_llc(result), loss_fn(params, sequences)
    row = {
        "step": int(step),
        "loss": result.init_loss,
        "loss_copies": float(losses[is_copy].mean()),
        "llc": [result.llc, result.llc_sem],
        "spread": [float(split.spread.value), float(split.spread.sem)],
        "sequences": round(result.work.total_fge * result.n_data),
        "findings": [finding.name for finding in result.health],
    }
    for name, settings in {"sgld": USUAL, "long": long}.items():
        if settings:
            found = sgld(params, sequences, jax.random.key(int(step)), **settings)
            row[name] = [float(number) for number in found]
    print(
        *(f"{name} {row[name]:.4g} " for name in ("step", "loss", "loss_copies", "sequences")),
        *(
            f"{name} {row[name][0]:.2f} ± {row[name][1]:.2f} "
            for name in ("llc", "spread", "sgld", "long")
            if name in row
        ),
        flush=True,
    )
    return row


def draw(rows, known, path):
    """Plot llc and loss over training, with the stages."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, layout="constrained")
    for name, style, color, label in (
        ("sgld", "s--", "#d55e00", "SGLD, 4 chains x 200 steps of 1e-3, all averaged"),
        ("llc", "o-", "#0072b2", "fastvi"),
        ("spread", "^:", "#009e73", "fastvi, spread: llc without the drift downhill"),
        ("long", "x", "k", "SGLD, 4 chains x 4,000 steps of 1e-4, a fifth left out"),
    ):
        chosen = [row for row in rows if name in row]
        if chosen:
            steps, (value, sem) = (
                [row["step"] for row in chosen],
                np.transpose([row[name] for row in chosen]),
            )
            above.errorbar(steps, value, 2 * sem, fmt=style, ms=4, color=color, label=label)
    above.set(ylabel="llc ± 2 errors", title=f"two layers of attention, nβ = γ = {NBETA:g}")
    above.legend(frameon=False, fontsize=9, loc="lower right")
    steps, loss, copies = (
        np.array([row[name] for row in rows]) for name in ("step", "loss", "loss_copies")
    )
    below.plot(steps, loss, "ko-", ms=4, label="all tokens")
    below.plot(steps, copies, "^-", ms=4, color="#cc79a7", label="tokens of later rounds")
    for name, level in known.items():
        below.axhline(level, color="0.5", lw=0.8, ls="--")
        below.text(steps[0], level, name, fontsize=8, va="bottom", color="0.3")
    below.set(xscale="log", xlabel="training step", ylabel="loss, nats per token")
    below.legend(frameon=False, fontsize=9, loc="lower center")

    def step_at(values, level):  # where they first fall below it
        falling = -np.minimum.accumulate(values)
        return np.exp(np.interp(-level, falling, np.log(steps)))

    unigrams, bigrams, _ = known.values()
    ends = [steps[0], step_at(loss, unigrams), step_at(loss, bigrams)]
    ends += [step_at(copies, bigrams / 2), steps[-1]]
    names = ("unigrams", "bigrams", "what is in\nthe context", "induction")
    for begin, end, name, shade in zip(ends, ends[1:], names, ("1", "0.93") * 2, strict=False):
        above.axvspan(begin, end, color=shade, lw=0)
        below.axvspan(begin, end, color=shade, lw=0)
        place = {"ha": "center", "va": "top", "transform": above.get_xaxis_transform()}
        above.text(np.sqrt(begin * end), 0.98, name, **place)
    figure.savefig(path, dpi=130)


def main():
    """Train, estimate at the checkpoints, print, draw."""
    parser = argparse.ArgumentParser(description="the llc of a transformer over its training")
    parser.add_argument("--out", default="runs/examples", type=pathlib.Path, help="folder")
    parser.add_argument("--quick", action="store_true", help="three checkpoints of 60 steps")
    arguments = parser.parse_args()
    steps, kept = train(60, 3) if arguments.quick else train(LAST, CHECKPOINTS)
    sequences, period = sample(jax.random.key(LAST + 1), SEQUENCES)
    is_copy = np.arange(1, LENGTH + 1) >= np.asarray(period)
    of_token, of_pair = (-np.sum(p * np.log(p)) for p in (LEVEL, LEVEL[:, None] * CHAIN))
    known = {"unigrams": of_token, "bigrams": of_pair - of_token}
    known["bigrams, and copies for free"] = known["bigrams"] * float(1 - is_copy.mean())
    checked = {} if arguments.quick else {len(steps) // 2: LONG, len(steps) - 1: LONG}
    rows = [
        row_of(step, params, sequences, is_copy, checked.get(number))
        for number, (step, params) in enumerate(zip(steps, kept, strict=True))
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    numbers = {"nbeta": NBETA, "localization": LOCALIZATION, "known_losses": known}
    text = json.dumps(numbers | {"checkpoints": rows}, indent=1)
    (arguments.out / "llc-of-a-transformer.json").write_text(text + "\n")
    draw(rows, known, arguments.out / "llc-of-a-transformer.png")


if __name__ == "__main__":
    main()
