"""A numpyro model as `fastvi.estimate_llc` takes it: its potential energy per example."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from fastvi._optional import import_optional
from fastvi._typing import Batch, PyTree


def numpyro_loss(
    model: Callable[..., Any],
    params: Mapping[str, Any],
    data: tuple[Any, ...],
    *,
    prior: bool = True,
) -> tuple[Callable[[PyTree, Batch], Any], PyTree]:
    """Make a loss of a model's latent sites in unconstrained coordinates.

    On all data, n times the loss is the potential energy: with nbeta = n and localization = 0 the
    local posterior is the model's own. On a minibatch the observed sites are averaged and the prior
    keeps its weight 1/n.

    Args:
        model: A numpyro model, called with the arrays of a batch.
        params: Values of the latent sites in their own coordinates, such as a mode, by name.
        data: The arrays that the model is called with, each with a leading axis of examples.
        prior: Whether the prior is part of the loss; without, it is the negative log likelihood
            alone.

    Returns:
        `(params, batch) -> mean loss per example`, and the parameters in unconstrained coordinates.

    Raises:
        MissingExtraError: If numpyro is not installed.
    """
    options = {"extra": "numpyro", "distribution": "numpyro", "purpose": "numpyro_loss"}
    infer = import_optional("numpyro.infer.util", **options)
    handlers = import_optional("numpyro.handlers", **options)
    num_data = _length(data)

    def log_likelihood(params: PyTree, batch: Batch) -> Any:
        values = infer.constrain_fn(model, tuple(batch), {}, params)
        # Without its latent sites the model's density is that of what it observes.
        observed = handlers.block(handlers.substitute(model, data=values), hide_fn=_is_latent)
        return infer.log_density(observed, tuple(batch), {}, {})[0]

    def loss_fn(params: PyTree, batch: Batch) -> Any:
        likelihood = log_likelihood(params, batch)
        # The potential energy is that of prior and likelihood together.
        prior_energy = infer.potential_energy(model, tuple(batch), {}, params) + likelihood
        return (prior_energy / num_data if prior else 0.0) - likelihood / _length(batch)

    # A model may draw while it is traced; no value of the loss depends on this key.
    seeded = handlers.seed(model, jax.random.key(0))
    return loss_fn, infer.unconstrain_fn(seeded, tuple(data), {}, dict(params))


def _is_latent(site: Mapping[str, Any]) -> bool:
    return site["type"] == "sample" and not site["is_observed"]


def _length(batch: Batch) -> int:
    return jax.tree_util.tree_leaves(batch)[0].shape[0]
