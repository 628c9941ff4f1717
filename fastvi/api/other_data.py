"""What a fitted q says of other data, and of single examples."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from fastvi._errors import DataError
from fastvi._typing import Array, Batch, Float, Given
from fastvi.api.resample import Fitted
from fastvi.evaluation.errors import chain_error, pair_mean
from fastvi.evaluation.llc import evaluation_draws, excess_at
from fastvi.results.estimate import LLCEstimate
from fastvi.target.inputs import check_data
from fastvi.target.look import weigh_other_data
from fastvi.target.modes import in_own_modes
from fastvi.target.objective import excess_loss, full_data_loss


class DataLLC(NamedTuple):
    """nbeta (E_q[L(w)] - L(w*)) with L the mean loss of other data than q was fitted to, and its Monte Carlo error."""

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
        data: Data of the structure that the loss takes.

    Returns:
        The coefficient in units of the fit's nbeta. It may be negative, as w* need not be a minimum
        for these data.

    Raises:
        DataError: If the result was loaded from disk, the loss has changed since, or the data
            cannot be used.

    Cost:
        As many losses of the data as the evaluation had draws.
    """
    fitted = _fitted(result)
    center = fitted.problem.posterior.center
    data = weigh_other_data(fitted.objective, center, check_data(data)[0], "loss_fn")
    excess, reference = _excess(fitted, data)
    llc = float(fitted.problem.posterior.nbeta) * np.asarray(excess, float)
    pairs, chains = pair_mean(llc, axis=1), llc.mean(axis=1)
    sem = chain_error(chains, pairs.std(axis=1, ddof=1) / np.sqrt(pairs.shape[1]))
    return DataLLC(float(chains.mean()), sem, chains, float(reference))


@in_own_modes
def example_losses(
    result: LLCEstimate, data: Given[Batch]
) -> Float[np.ndarray, "chains draws examples"]:
    """Evaluate the loss of each example by itself at the draws that the estimate was evaluated at.

    Args:
        result: An estimate of this process, from `estimate_llc`.
        data: Data of the structure that the loss takes. Where it returns the mean of a batch, each
            example is passed as a batch of one.

    Returns:
        Losses in nats, shape (chains, draws, examples), whose mean over the examples is the loss of
        the data: of a weighted loss each example's share in it.

    Raises:
        DataError: If the result was loaded from disk, the loss has changed since, or the data
            cannot be used.
    """
    fitted = _fitted(result)
    objective, center = fitted.objective, fitted.problem.posterior.center
    data = weigh_other_data(objective, center, check_data(data)[0], "loss_fn")

    @jax.jit
    def losses(displacement):
        def one(example):
            batch = jax.tree_util.tree_map(lambda leaf: leaf[None], example)
            return objective.loss(center + displacement, batch)

        found = objective.example_losses(center + displacement, data)
        return jax.vmap(one)(data) if found is None else found

    draws = jax.jit(functools.partial(_draws, fitted.fit.family, num_draws=_num_draws(fitted)))
    return np.stack(
        [
            np.stack([np.asarray(losses(displacement)) for displacement in draws(params, key)])
            for params, key in zip(_each_chain(fitted), fitted.keys, strict=True)
        ]
    )


def _fitted(result: LLCEstimate) -> Fitted:
    if result.fitted is None:
        raise DataError(
            "this estimate holds no fit to draw from (it was loaded from disk). Run estimate_llc "
            "again."
        )
    result.fitted.check_unchanged()
    return result.fitted


def _excess(fitted: Fitted, data: Batch) -> tuple[Float[Array, "chains draws"], Array]:
    family, center = fitted.fit.family, fitted.problem.posterior.center

    @jax.jit
    def run(params, keys, data):
        def chain(inputs):
            draws = evaluation_draws(family, *inputs, num_draws=_num_draws(fitted))
            return excess_at(
                draws, center, lambda w: excess_loss(fitted.objective, w, center, data)
            )

        return jax.lax.map(chain, (params, keys)), full_data_loss(fitted.objective, center, data)

    return run(fitted.fit.params, fitted.keys, data)


def _draws(family, params, key, *, num_draws: int) -> Float[Array, "draws dim"]:
    return evaluation_draws(family, params, key, num_draws).displacement


def _num_draws(fitted: Fitted) -> int:
    return fitted.fit.outcome.evaluation.excess.shape[1]


def _each_chain(fitted: Fitted):
    chains = fitted.keys.shape[0]
    return [
        jax.tree_util.tree_map(lambda leaf, i=i: leaf[i], fitted.fit.params) for i in range(chains)
    ]
