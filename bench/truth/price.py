"""Is the curvature at w*, or the one averaged over q, the better start of a fit?

By Price's theorem the best Gaussian q has the precision `gamma + nbeta E_q[H(w)]`, not that at w*.
A short fit gives a q, the Hessian is averaged over draws of it (that of the loss averaged over
shifts by these draws), and a second fit starts there; the other lane takes the same total of steps
from the curvature at w*.

python -m bench.truth.price                          a few problems
python -m bench.truth.price --problems tanh_3_g1
"""

import argparse
import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from bench import harness
from bench.truth.problems import PROBLEMS
from bench.truth.reference import load_reference
from fastvi import VIConfig
from fastvi.api.arguments import make_problem
from fastvi.api.plan import family_choice, fit_schedule, fit_settings, with_draws
from fastvi.fitting.run import run_fit
from fastvi.fitting.stages import programs_for
from fastvi.geometry.start import make_start
from fastvi.target.data import hold
from fastvi.target.losses import take_examples
from fastvi.target.ravel import TreeObjective, ravel_loss

TABLE = "price"
DEFAULT = (
    "deep_linear_2x5_g10",
    "deep_linear_2x5_g100",
    "deep_linear_2x22_g10",
    "tanh_3_g1",
    "digits_16_g1",
)
FIRST, SECOND, SHIFTS, CHAINS = 300, 1200, 16, 4


@dataclasses.dataclass(frozen=True)
class ShiftedLoss:
    """The mean of a loss over shifted parameters."""

    objective: TreeObjective
    shifts: jax.Array

    def loss(self, w, batch):
        """Average over the shifts."""
        return jnp.mean(
            jax.lax.map(lambda shift: self.objective.loss(w + shift, batch), self.shifts)
        )

    def grad(self, w, batch):
        """Differentiate `loss`."""
        return jax.grad(self.loss)(w, batch)

    def value_and_grad(self, w, batch):
        """Evaluate both."""
        return jax.value_and_grad(self.loss)(w, batch)


def fits(name: str) -> list[dict]:
    """Fit both lanes; return rows of price.csv."""
    source = PROBLEMS[name]()
    objective, center = ravel_loss(source.loss_fn, source.params, jnp.float32)
    config = with_draws(
        VIConfig(steps=FIRST + SECOND, samples_per_step=2, eval_samples=128), center.size, 1.0
    )
    problem = make_problem(center, hold(source.data), source.nbeta, source.gamma, config, "nbeta")
    keys = jax.random.split(jax.random.key(0), CHAINS)
    settings, choice = fit_settings(config), family_choice(config)
    stages = programs_for(objective, problem, settings)

    def fit(stages, steps):
        return run_fit(stages, problem, choice, fit_schedule(config.replace(steps=steps)), keys)

    long, short = fit(stages, FIRST + SECOND), fit(stages, FIRST)
    params = jax.tree_util.tree_map(lambda leaf: leaf[0], short.params)
    draws = short.family.sample(params, jax.random.key(1), SHIFTS, antithetic=True, block=0)
    smooth = ShiftedLoss(objective, draws.displacement)

    @jax.jit
    def prepare(problem, key, scale):
        rows = min(settings.start.examples, problem.num_data)
        subset = hold(take_examples(problem.data.examples, slice(rows)))
        arguments = smooth, problem.posterior, subset, problem.next_data, settings.start
        return make_start(*arguments, key, scale)

    averaged = fit(stages._replace(compiled=stages.compiled._replace(prepare=prepare)), SECOND)
    per_step = 2 * problem.batch_size / source.n_data * CHAINS
    hvp = 2 * min(settings.start.examples, source.n_data) / source.n_data
    extra = float(averaged.start.num_hvp) * hvp * SHIFTS
    return [
        _row(name, "at w*", long, (FIRST + SECOND) * per_step),
        _row(name, "averaged over q", averaged, (FIRST + SECOND) * per_step + extra),
    ]


def _row(name: str, curvature: str, fit, fge: float) -> dict:
    evaluation = fit.outcome.evaluation
    return {
        "problem": name,
        "curvature": curvature,
        "elbo": float(np.mean(evaluation.elbo)),
        "llc_vi": float(np.mean(evaluation.llc)),
        "reference": load_reference(name)["value"],
        "rank": int(fit.start.rank),
        "fge": fge,
    }


def main(arguments: list[str]) -> None:
    """Measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--problems", nargs="+", default=DEFAULT, choices=list(PROBLEMS), metavar="NAME"
    )
    for name in parser.parse_args(arguments).problems:
        rows = fits(name)
        harness.record(TABLE, rows)
        for row in rows:
            print(row, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
