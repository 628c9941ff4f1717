"""The llc of the digits network over its training: warm and cold starts, their work, and the figure of docs.

python -m bench.llc_curve            a few minutes on two idle cores
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
OPTIONS = {"correction": "none", "num_chains": 1, "eval_samples": 64, "progress": False}
BUDGETS = {
    "warm": {"steps": 600, "warm_steps": 100},
    "cold": {"steps": 600, "warm_start": False},
    "cold, 100 steps": {"steps": 100, "warm_start": False},
}


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


def measure(names=tuple(BUDGETS)) -> dict:
    """Run the budgets of these names."""
    data, times, kept = training_checkpoints()
    rows: dict = {"training_step": times.tolist()}
    for name in names:
        curve = llc_curve(cross_entropy, kept, data, **BUDGETS[name], **OPTIONS)
        rows[name] = {
            "llc": curve.llc.tolist(),
            "llc_sem": curve.llc_sem.tolist(),
            "elbo": [estimate.elbo for estimate in curve.estimates],
            "total_fge": curve.total_fge.tolist(),
        }
        rows["init_loss"] = curve.init_loss.tolist()
        print(name, np.round(curve.llc, 1), f"{np.sum(curve.total_fge):.0f} FGE", flush=True)
    return rows


def report(rows: dict) -> None:
    """Say what each budget costs, and how far its q is from the best that any of them found."""
    best = np.max([rows[name]["elbo"] for name in BUDGETS], axis=0)
    for name in BUDGETS:
        gap, work = best - np.array(rows[name]["elbo"]), np.array(rows[name]["total_fge"])
        print(f"{name:16s} elbo below the best {gap.mean():.2f} nats, {gap.max():.2f} most; {work.sum():.0f} FGE")


def draw(rows: dict) -> None:
    """Plot llc, ELBO and work beside the training loss."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    times = rows["training_step"]
    for name, style in zip(BUDGETS, ("C0o", "C1s", "C2^"), strict=True):
        axes[0].errorbar(times, rows[name]["llc"], rows[name]["llc_sem"], fmt=style, ms=4, label=name)
        axes[1].plot(times, rows[name]["elbo"], style, ms=4)
        axes[2].plot(times, np.cumsum(rows[name]["total_fge"]), style, ms=4, ls="-")
    axes[0].set(xscale="log", xlabel="training step", ylabel="llc under q", title="digits network, 64-16-10")
    axes[1].set(xscale="log", xlabel="training step", ylabel="nats", title="ELBO: higher is closer")
    axes[2].set(xscale="log", yscale="log", xlabel="training step", ylabel="FGE so far", title="work")
    twin = axes[0].twinx()
    twin.plot(times, rows["init_loss"], "0.6", lw=1)
    twin.set(yscale="log", ylabel="training loss (grey)")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(FIGURE, dpi=130)


def main() -> None:
    """Measure unless told to read what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="only report and draw")
    if not parser.parse_args().again:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    rows = json.loads(RESULTS.read_text())
    report(rows)
    draw(rows)


if __name__ == "__main__":
    main()
