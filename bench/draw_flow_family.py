"""Draw docs/figures/flow-family.png: the map of the flow family, and what it is for."""

import pathlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from fastvi import estimate_llc

COUNT, DRAWS = 10_000, 600


def crossing(w, batch):
    return 0.5 * (w[0] * w[1]) ** 2


def draws_of(family):
    result = estimate_llc(
        crossing,
        jnp.zeros(2),
        jnp.zeros((COUNT, 1)),
        family=family,
        method="variational",
        num_chains=1,
        progress=False,
    )
    fit = result.fitted.fit
    params = jax.tree_util.tree_map(lambda leaf: leaf[0], fit.params)
    return result.llc, np.asarray(
        fit.family.sample(params, jax.random.key(1), DRAWS, antithetic=True).displacement
    )


def draw_map(axes):
    rng = np.random.default_rng(0)
    along, off = rng.normal(size=200).clip(-2.2, 2.2), 0.12 * rng.normal(size=200)
    bent = 0.9 * along + 0.25 * np.tanh(2 * along)
    axes.scatter(along, np.full(200, 2.6) + off * 2.5, s=6, color="0.6", label="noise ξ")
    axes.scatter(
        bent * np.cos(0.5) - off * np.sin(0.5),
        bent * np.sin(0.5) + off * np.cos(0.5),
        s=6,
        color="C0",
    )
    line = np.array([-2.4, 2.4])
    axes.plot(line * np.cos(0.5), line * np.sin(0.5), color="k", lw=1)
    axes.annotate("", (0.2, 0.6), (0.1, 1.9), arrowprops={"arrowstyle": "->"})
    axes.text(0.35, 1.45, "flow and L along E,\nσ beside it", fontsize=9, backgroundcolor="w")
    axes.text(0.9, -0.75, "μ + Eᵀ L a", fontsize=9)
    axes.text(-2.3, 3.5, "noise ξ", fontsize=9, color="0.4")
    axes.annotate(
        "",
        (-1.1 - 0.30, -0.6 + 0.55),
        (-1.1, -0.6),
        arrowprops={"arrowstyle": "<->", "color": "C3"},
    )
    axes.text(-2.25, 0.05, "σ (ξ - EᵀEξ)", fontsize=9, color="C3")
    axes.set(xlim=(-2.6, 2.8), ylim=(-1.9, 3.9), aspect="equal", title="The map")
    axes.set_xticks([])
    axes.set_yticks([])


def draw_posterior(axes, family, color):
    llc, draws = draws_of(family)
    axis = np.linspace(-3, 3, 400)
    x, y = np.meshgrid(axis, axis)
    density = np.exp(-COUNT / np.log(COUNT) * 0.5 * (x * y) ** 2 - 0.5 * (x**2 + y**2))
    axes.imshow(np.sqrt(density), origin="lower", extent=(-3, 3, -3, 3), cmap="Greys", vmax=1.2)
    axes.scatter(draws[:, 0], draws[:, 1], s=4, color=color, alpha=0.7)
    axes.set(
        xlim=(-3, 3),
        ylim=(-3, 3),
        title=f"{family}: llc {llc:.2f} (exact 0.38)",
        xlabel="w₁",
        ylabel="w₂",
    )


def main():
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), constrained_layout=True)
    draw_map(axes[0])
    draw_posterior(axes[1], "mfa", "C1")
    draw_posterior(axes[2], "flow", "C0")
    figure.savefig(pathlib.Path(__file__).parents[1] / "docs/figures/flow-family.png", dpi=110)


if __name__ == "__main__":
    main()
