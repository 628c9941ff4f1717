"""The llc of the digits network over its training: warm and cold starts, their work, and the figure of docs.

python -m bench.llc_curve            about 20 minutes on two cores
"""

import argparse
import json
import pathlib

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from fastvi import llc_curve
from fastvi.demos.digits import cross_entropy, init_network, load_digits

ROOT = pathlib.Path(__file__).parents[1]
RESULTS, FIGURE = ROOT / "bench/results/llc_curve.json", ROOT / "docs/figures/llc-over-training.png"
HIDDEN, LR, FIRST, LAST, COUNT = 16, 3e-3, 300, 6000, 20
LONG_STEPS = 8000
OPTIONS = {"correction": "none", "num_chains": 1, "eval_samples": 256, "progress": False}
BUDGETS = {"warm": (True, 600), "cold": (False, 3000), "cold, as few steps": (False, 600)}


def training_checkpoints():
    """Train on all data and return the steps and the parameters at `COUNT` of them."""
    data = load_digits()
    optimizer = optax.adam(optax.cosine_decay_schedule(LR, LAST))
    params = init_network(jax.random.key(0), HIDDEN)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(cross_entropy)(params, data), state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry, length: jax.lax.scan(step, carry, length=length)[0], static_argnums=1)
    times = np.unique(np.geomspace(FIRST, LAST, COUNT).astype(int))
    carry, kept, done = (params, optimizer.init(params)), [], 0
    for time in times:
        carry, done = run(carry, int(time) - done), int(time)
        kept.append(carry[0])
    return data, times, kept


def measure() -> dict:
    """Run every budget, and a long fit at each checkpoint to compare with."""
    data, times, kept = training_checkpoints()
    rows = {"training_step": times.tolist()}
    for name, (warm, steps) in {**BUDGETS, "long": (False, LONG_STEPS)}.items():
        curve = llc_curve(cross_entropy, kept, data, steps=steps, warm_start=warm, **OPTIONS)
        rows[name] = {
            "llc": curve.llc.tolist(),
            "llc_sem": curve.llc_sem.tolist(),
            "elbo": [estimate.elbo for estimate in curve.estimates],
            "total_fge": curve.total_fge.tolist(),
        }
        rows["init_loss"] = curve.init_loss.tolist()
        print(name, np.round(curve.llc, 1), f"{np.sum(curve.total_fge):.0f} FGE", flush=True)
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    return rows


def report(rows: dict) -> None:
    """Say what each budget costs and how far it is from the long fit."""
    truth = np.array(rows["long"]["llc"])
    for name in BUDGETS:
        error = np.abs(np.array(rows[name]["llc"]) - truth)[1:]
        gap = (np.array(rows["long"]["elbo"]) - np.array(rows[name]["elbo"]))[1:]
        work = np.array(rows[name]["total_fge"])[1:]
        print(
            f"{name:26s} error {error.mean():.3g} mean, {error.max():.3g} most; elbo gap {gap.mean():.3g}; "
            f"{work.mean():.0f} FGE each"
        )


def draw(rows: dict) -> None:
    """Plot the curves beside the training loss."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    times = rows["training_step"]
    for name, style in (("long", "k-"), ("cold", "C1s"), ("warm", "C0o")):
        axes[0].errorbar(times, rows[name]["llc"], rows[name]["llc_sem"], fmt=style, ms=4, label=name)
        axes[1].plot(times, np.cumsum(rows[name]["total_fge"]), style, ms=4, ls="-", label=name)
    axes[0].set(xscale="log", xlabel="training step", ylabel="llc under q", title="digits network, 64-16-10")
    axes[1].set(xscale="log", yscale="log", xlabel="training step", ylabel="FGE so far", title="work")
    twin = axes[0].twinx()
    twin.plot(times, rows["init_loss"], "0.6", lw=1)
    twin.set(yscale="log", ylabel="training loss (grey)")
    axes[0].legend(frameon=False)
    figure.savefig(FIGURE, dpi=130)


def main() -> None:
    """Measure unless told to read what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="only report and draw")
    rows = json.loads(RESULTS.read_text()) if parser.parse_args().again else measure()
    report(rows)
    draw(rows)


if __name__ == "__main__":
    main()
