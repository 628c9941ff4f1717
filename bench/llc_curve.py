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
OPTIONS = {"correction": "none", "num_chains": 1, "progress": False}
BUDGETS = {
    "warm": {"steps": 600, "eval_samples": 256},
    "warm, 100 steps": {"steps": 100, "eval_samples": 64},
    "cold": {"steps": 3000, "eval_samples": 256, "warm_start": False},
    "cold, as few steps": {"steps": 600, "eval_samples": 256, "warm_start": False},
}
COMPARED_DRAWS = 64  # the work is stated as if every budget had evaluated q at as many


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


def work_of(name: str, rows: dict) -> np.ndarray:
    """The FGE at each checkpoint with `COMPARED_DRAWS` evaluation draws; a loss is a third of a gradient."""
    return np.array(rows[name]["total_fge"]) - (BUDGETS[name]["eval_samples"] - COMPARED_DRAWS) / 3


def report(rows: dict) -> None:
    """Say what each budget costs, and how far its q is from the best that any of them found, in either half."""
    best = np.max([rows[name]["elbo"] for name in BUDGETS], axis=0)
    for name in BUDGETS:
        for half in (slice(0, COUNT // 2), slice(COUNT // 2, COUNT)):
            gap, llc = (best - np.array(rows[name]["elbo"]))[half], np.array(rows[name]["llc"])[half]
            work = work_of(name, rows)[half]
            print(f"{name:18s} below the best elbo {gap.mean():6.2f}; llc {llc.mean():6.1f}; {work.sum():5.0f} FGE")


def draw(rows: dict) -> None:
    """Plot llc, ELBO and work beside the training loss."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    times = rows["training_step"]
    for name, style in zip(BUDGETS, ("C0o", "C2^", "C1s", "C3v"), strict=True):
        axes[0].plot(times, rows[name]["llc"], style, ms=4, label=name)
        axes[1].plot(times, rows[name]["elbo"], style, ms=4)
        axes[2].plot(times, np.cumsum(work_of(name, rows)), style, ms=4, ls="-")
    axes[0].set(xscale="log", xlabel="training step", ylabel="llc under q", title="digits network, 64-16-10")
    axes[1].set(xscale="log", xlabel="training step", ylabel="nats", title="ELBO: higher is closer")
    axes[2].set(xscale="log", yscale="log", xlabel="training step", ylabel="FGE so far", title="work")
    twin = axes[0].twinx()
    twin.plot(times, rows["init_loss"], "0.6", lw=1)
    twin.set(yscale="log", ylabel="training loss (grey)")
    axes[1].legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8)
    for axis in axes:
        axis.set_xticks([300, 1000, 3000, 6000], ["300", "1,000", "3,000", "6,000"])
        axis.set_xticks([], minor=True)
    axes[2].set_yticks([200, 500, 1000, 2000, 5000], ["200", "500", "1,000", "2,000", "5,000"])
    axes[2].set_yticks([], minor=True)
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
