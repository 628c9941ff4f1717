"""What a fitted q says of other data, and of single examples."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from fastvi._compilation import PROGRAMS, compiler_options
from fastvi._modes import in_own_modes
from fastvi._typing import Array, Batch, Float, Given, Keys
from fastvi.api.resample import Fitted
from fastvi.evaluation.errors import chain_error, pair_mean
from fastvi.evaluation.llc import DataLosses, draws_at_once, evaluation_draws, losses_at
from fastvi.families.base import AbstractFamily
from fastvi.observables.example_losses import losses_by_example
from fastvi.results.estimate import LLCEstimate
from fastvi.target.containers import hold_data
from fastvi.target.data import Data, Problem, shared_mean
from fastvi.target.fingerprint import shapes_of
from fastvi.target.look import weigh
from fastvi.target.losses import beside_same


class DataLLC(NamedTuple):
    """nbeta (E_q[L(w)] - L(w*)) with L the mean loss of other data than q was fitted to.

    `llc_sem` is its Monte Carlo error.
    """

    llc: float
    llc_sem: float
    llc_per_chain: np.ndarray
    init_loss: float


@in_own_modes
def llc_on(result: LLCEstimate, data: Given[Batch]) -> DataLLC:
    """Estimate the data-restricted coefficient: the posterior of the fit, the loss of other data.

    Under q, at the draws that the estimate was evaluated at, without control variates: compare it
    with `llc_vi`. For a posterior of other data run `estimate_llc` on them.

    Args:
        result: An estimate of this process, from `estimate_llc`.
        data: Data of the structure that the loss takes, held in memory.

    Returns:
        The coefficient in units of the fit's nbeta. It may be negative, as w* need not be a minimum
        for these data.

    Raises:
        DataError: If the result is a walk without a fit or was loaded from disk, the loss has
            changed since, or the data cannot be used.

    Cost:
        As many losses of the data as the evaluation had draws.
    """
    programs, arguments = _at_other_data(result, data)
    losses = jax.device_get(programs.losses(*arguments))
    llc = result.nbeta * np.asarray(losses.excess, float)
    # draws come in mirrored pairs, which are not independent of each other
    pairs, chains = pair_mean(llc, axis=1), llc.mean(axis=1)
    sem = chain_error(chains, pairs.std(axis=1, ddof=1) / np.sqrt(pairs.shape[1]))
    # The loss at w* is the same for all chains.
    return DataLLC(float(chains.mean()), sem, chains, float(losses.reference[0]))


@in_own_modes
def example_losses(
    result: LLCEstimate, data: Given[Batch]
) -> Float[np.ndarray, "chains draws examples"]:
    """Evaluate the loss of each example by itself at the draws that the estimate was evaluated at.

    Args:
        result: An estimate of this process, from `estimate_llc`.
        data: Data of the structure that the loss takes, held in memory, in an order that does not
            change. Where the loss returns the mean of a batch, each example is passed as a batch of
            one.

    Returns:
        Losses in nats, shape (chains, draws, examples), whose mean over the examples is the loss of
        the data: of a weighted loss each example's share in it.

    Raises:
        DataError: If the result is a walk without a fit or was loaded from disk, the loss has
            changed since, the data cannot be used, or a loader shuffles them.
    """
    programs, arguments = _at_other_data(result, data, in_order=True)
    return np.asarray(programs.by_example(*arguments))


class _Programs(NamedTuple):
    """Compiled: `(family, problem, params, keys)` to `DataLosses`, and to losses of examples."""

    losses: Callable[..., DataLosses]
    by_example: Callable[..., Float[Array, "chains draws examples"]]


def _at_other_data(
    result: LLCEstimate, data: Given[Batch], *, in_order: bool = False
) -> tuple[_Programs, tuple[Any, ...]]:
    """Return the programs and their arguments: the fit, and its problem with other data."""
    fitted: Fitted = result.fit_for("draw from")
    fitted.check_unchanged()
    problem = on_other_data(fitted.objective, fitted.problem, data, "loss_fn", in_order=in_order)
    arguments = (fitted.fit.family, problem, fitted.fit.params, fitted.keys)
    return _programs(fitted, problem), arguments


def on_other_data(
    objective: Any, problem: Problem, data: Given[Batch], name: str, *, in_order: bool
) -> Problem:
    """Return the problem with other data, which errors call by a name.

    Results by example need data in an order that does not change.
    """
    dtype = problem.posterior.center.dtype
    examples = beside_same(
        problem.data.examples, hold_data(data, dtype=dtype, in_order=in_order)[0]
    )
    held = Data(examples, problem.data.max_batch)
    # A weighted loss is divided by the mean weight of these data, not of those of the fit.
    return weigh(objective, dataclasses.replace(problem, data=held), name)


def _programs(fitted: Fitted, problem: Problem) -> _Programs:
    chains, num_draws = fitted.fit.outcome.evaluation.excess.shape
    of_draw = fitted.loss.bytes_at_draw(problem.posterior.center.size, problem.num_data)
    computed = chains * num_draws * of_draw

    def build(objective: Any) -> _Programs:
        def at_draws(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(family: AbstractFamily, problem: Problem, params: Any, keys: Keys) -> Any:
                def chain(inputs):
                    draws = evaluation_draws(family, *inputs, num_draws=num_draws)
                    return function(problem, draws.displacement)

                return jax.lax.map(chain, (params, keys))

            # it runs once for each set of data
            return jax.jit(run, compiler_options=compiler_options(computed))

        return _Programs(
            at_draws(functools.partial(_losses, objective)),
            at_draws(functools.partial(losses_by_example, objective)),
        )

    return PROGRAMS.find(
        fitted.loss, ("other data", num_draws, shapes_of(problem)), (fitted.objective,), build
    )


def _losses(objective: Any, problem: Problem, displacement: Array) -> DataLosses:
    return shared_mean(
        functools.partial(losses_at, objective),
        problem.data,
        (problem.posterior.center, displacement),
        1 + draws_at_once(displacement.shape[0]),
    )
