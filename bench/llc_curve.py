"""The llc of the digits network over its training.

Warm and cold starts, their work, and the figure of docs.

python -m bench.llc_curve            a few minutes on two idle cores
"""

import argparse
import json
import pathlib

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from bench.harness import efficiency_of, work_normalized
from fastvi import llc_curve
from fastvi.demos.digits import cross_entropy, init_network, load_digits

ROOT = pathlib.Path(__file__).parents[1]
RESULTS, FIGURE = ROOT / "bench/results/llc_curve.json", ROOT / "docs/figures/llc-over-training.png"
HIDDEN, LR, FIRST, LAST, COUNT = 16, 3e-3, 300, 6000, 20
BUDGETS = {
    "warm": {"error": 0.05},
    "warm, error 0.1": {"error": 0.1},
    "cold": {"error": 0.05, "warm_start": False},
}
REFERENCE = {"error": 0.01}


def training_checkpoints():
    """Train on all data and return the steps and the parameters at `COUNT` of them."""
    data = load_digits()
    optimizer = optax.adam(optax.cosine_decay_schedule(LR, LAST))
    params = init_network(jax.random.key(0), HIDDEN)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(cross_entropy)(params, data), state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(
        lambda carry, length: jax.lax.scan(step, carry, length=length)[0], static_argnums=1
    )
    times = np.unique(np.geomspace(FIRST, LAST, COUNT).astype(int))
    carry, kept, done = (params, optimizer.init(params)), [], 0
    for time in times:
        carry, done = run(carry, int(time) - done), int(time)
        kept.append(carry[0])
    return data, times, kept


def measure() -> dict:
    """Run all budgets, and the reference with another key."""
    data, times, kept = training_checkpoints()
    rows: dict = {"training_step": times.tolist()}
    for name, options in {**BUDGETS, "reference": {**REFERENCE, "key": 100}}.items():
        curve = llc_curve(cross_entropy, kept, data, progress=False, **options)
        columns = [efficiency_of(estimate) for estimate in curve.estimates]
        rows[name] = {
            "llc": curve.llc.tolist(),
            "llc_sem": curve.llc_sem.tolist(),
            "total_fge": curve.total_fge.tolist(),
            **{column: [one[column] for one in columns] for column in columns[0]},
        }
        rows["init_loss"] = curve.init_loss.tolist()
        print(name, np.round(curve.llc, 1), f"{np.sum(curve.total_fge):.0f} FGE", flush=True)
    return rows


def report(rows: dict) -> None:
    """Say what each budget costs, how far it is from the reference, and both in one number.

    That is relative variance x FGE: the stated one, by its median over checkpoints, and the real
    one, by its mean. Last comes the median of FGE per second.
    """
    truth = np.array(rows["reference"]["llc"])
    for name in (*BUDGETS, "reference"):
        llc, sem, fge = (np.array(rows[name][part]) for part in ("llc", "llc_sem", "total_fge"))
        error = np.abs(llc / truth - 1)
        rates = rows[name].get("fge_per_second", [])  # of a later run than the others
        cells = (
            f"{100 * np.median(error):.1f} %",
            f"{100 * error.max():.1f} %",
            f"{np.sum(fge):,.0f}",
            f"{np.median(work_normalized(sem / llc, fge)):.3g}",
            f"{np.mean(work_normalized(error, fge)):.3g}",
            f"{np.median(rates):.3g}" if rates else "",
        )
        print("| " + " | ".join((name, *cells)) + " |")


def draw(rows: dict) -> None:
    """Plot llc and work beside the training loss."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    times = rows["training_step"]
    axes[0].plot(times, rows["reference"]["llc"], "k-", lw=1, label="reference")
    for name, style in zip(BUDGETS, ("C0o", "C2^", "C1s"), strict=True):
        axes[0].errorbar(
            times, rows[name]["llc"], rows[name]["llc_sem"], fmt=style, ms=4, label=name
        )
        axes[1].plot(times, np.cumsum(rows[name]["total_fge"]), style, ms=4, ls="-")
    axes[0].set(
        xscale="log", xlabel="training step", ylabel="llc", title="digits network, 64-16-10"
    )
    axes[1].set(
        xscale="log", yscale="log", xlabel="training step", ylabel="FGE so far", title="work"
    )
    twin = axes[0].twinx()
    twin.plot(times, rows["init_loss"], "0.6", lw=1)
    twin.set(yscale="log", ylabel="training loss (grey)")
    axes[0].legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.set_xticks([300, 1000, 3000, 6000], ["300", "1,000", "3,000", "6,000"])
        axis.set_xticks([], minor=True)
    figure.savefig(FIGURE, dpi=130)


def main() -> None:
    """Measure unless told to read what was measured before."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--again", action="store_true", help="only report and draw")
    if not parser.parse_args().again:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    rows = json.loads(RESULTS.read_text())
    report(rows)
    draw(rows)


if __name__ == "__main__":
    main()
