"""What control variates take off the variance of covariances between losses, on tanh networks.

Each row is one network of a hidden layer on 200 examples with noise of 0.3, drawn from over some
keys: the variance over the keys of all entries of the covariance matrix of the losses, plain over
reduced, and whether the stated errors fit either.

python -m bench.draw_variance                      four minutes; BENCH_KEEP=1 keeps the rows
"""

import jax
import jax.numpy as jnp
import numpy as np

import fastvi
from bench import harness

TABLE = "draw_variance"
# hidden units, localization, draws of each walker
CASES = ((1, 1.0, 200), (3, 10.0, 200), (3, 1.0, 400))
EXAMPLES, INPUTS, NOISE, KEYS = 200, 2, 0.3, 12


def problem(hidden: int):
    """Return a loss, its minimum near the teacher, and the data."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(EXAMPLES, INPUTS)).astype(np.float32)
    teacher = 1.5 * rng.normal(size=hidden * (INPUTS + 2))

    def network(w, x):
        first, bias, last = jnp.split(w, [hidden * INPUTS, hidden * (INPUTS + 1)])
        return jnp.tanh(x @ first.reshape(hidden, INPUTS).T + bias) @ last

    noise = NOISE * rng.normal(size=EXAMPLES)
    data = inputs, (np.asarray(network(teacher, inputs)) + noise).astype(np.float32)

    def loss_fn(w, batch):
        return 0.5 * (network(w, batch[0]) - batch[1]) ** 2 / NOISE**2

    def mean_loss(w):
        return loss_fn(w, data).mean()

    @jax.jit
    def step(w):
        curvature = jax.hessian(mean_loss)(w) + 1e-3 * jnp.eye(w.size)
        return w - 0.5 * jnp.linalg.solve(curvature, jax.grad(mean_loss)(w))

    w = jnp.asarray(teacher, jnp.float32)
    for _ in range(60):
        w = step(w)
    return loss_fn, w, data


def measure(hidden: int, localization: float, draws: int) -> dict:
    """Return the row of a case."""
    loss_fn, w, data = problem(hidden)
    found, chosen, findings = {"on": [], "off": []}, None, set()
    for key in range(KEYS):
        result = fastvi.estimate_llc(
            loss_fn, w, data, localization=localization, key=key, progress=False
        )
        drawn = fastvi.sample_posterior(result, draws, losses={"train": data}, progress=False)
        chosen = drawn.columns
        findings |= {finding.name for finding in drawn.health}
        for name, one in (("on", drawn), ("off", drawn.plain)):
            matrix, llc = one.covariance("train"), one.llc_estimate
            found[name].append((matrix.value, matrix.sem, float(llc.sem)))
    values, sems, llc_sems = (
        {name: np.array([one[part] for one in found[name]]) for name in found} for part in range(3)
    )
    variance = {name: np.var(values[name], axis=0, ddof=1) for name in found}
    moved = (values["on"] - values["off"]).mean(axis=0)
    error = np.sqrt((variance["on"] + variance["off"]) / KEYS)
    return {
        "hidden": hidden,
        "dim": w.size,
        "localization": localization,
        "draws": draws,
        "degree": 0 if chosen is None else chosen.degree,
        "directions": 0 if chosen is None else chosen.directions,
        "median_ratio": float(np.median(variance["off"] / variance["on"])),
        "total_ratio": float(variance["off"].sum() / variance["on"].sum()),
        "llc_ratio": float(np.mean(llc_sems["off"] ** 2) / np.mean(llc_sems["on"] ** 2)),
        "stated_over_real_on": float((sems["on"] ** 2).mean(0).sum() / variance["on"].sum()),
        "stated_over_real_off": float((sems["off"] ** 2).mean(0).sum() / variance["off"].sum()),
        "rms_z_on_less_off": float(np.sqrt(np.mean((moved / error) ** 2))),
        "keys": KEYS,
        "findings": " ".join(sorted(findings)),
    }


if __name__ == "__main__":
    rows = [measure(*case) for case in CASES]
    harness.record(TABLE, rows)
    print(harness.as_text(rows))
