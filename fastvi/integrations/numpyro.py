"""A numpyro model as `fastvi.estimate_llc` takes it: its potential energy per example."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from fastvi._errors import DataError
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
        model: A numpyro model, called with the arrays of a batch, also within handlers such as
            `substitute`, `condition` and `reparam`. Plates over examples take the batch's length.
        params: Values of all latent sites in their own coordinates, such as a mode, by name; and of
            those `numpyro.param` sites that vary too, with a flat prior in unconstrained
            coordinates. The others keep the value that the model gives them.
        data: The arrays that the model is called with, each with a leading axis of examples.
        prior: Whether the prior is part of the loss; without, it is the negative log likelihood
            alone.

    Returns:
        `(params, batch) -> mean loss per example`, and the parameters in unconstrained coordinates.

    Raises:
        DataError: If the names are not those of the latent sites, a latent site is discrete or one
            of each example, a plate is subsampled, or nothing is observed.
        MissingExtraError: If numpyro is not installed.
    """
    options = {"extra": "numpyro", "distribution": "numpyro", "purpose": "numpyro_loss"}
    infer = import_optional("numpyro.infer.util", **options)
    handlers = import_optional("numpyro.handlers", **options)
    if not isinstance(data, (tuple, list)) or not data:
        raise DataError(
            "data must be a tuple of the arrays that the model is called with; got "
            f"{type(data).__name__}."
        )
    num_data = _length(data)
    # A model may draw while it is traced; no value of the loss depends on this key.
    seeded = handlers.seed(model, jax.random.key(0))
    latent = _check_sites(handlers, seeded, params, tuple(data))

    def log_likelihood(values: PyTree, batch: Batch) -> Any:
        # Without its latent sites the model's density is that of what it observes.
        observed = handlers.block(handlers.substitute(model, data=values), hide_fn=_is_latent)
        return infer.log_density(observed, tuple(batch), {}, {})[0]

    def loss_fn(params: PyTree, batch: Batch) -> Any:
        values = infer.constrain_fn(model, tuple(batch), {}, params)
        likelihood = log_likelihood(values, batch)
        # numpyro takes latent sites in unconstrained coordinates here, and param sites in their own
        mixed = {name: (params if name in latent else values)[name] for name in params}
        # The potential energy is that of prior and likelihood together.
        prior_energy = infer.potential_energy(model, tuple(batch), {}, mixed) + likelihood
        return (prior_energy / num_data if prior else 0.0) - likelihood / _length(batch)

    return loss_fn, infer.unconstrain_fn(seeded, tuple(data), {}, dict(params))


def _is_latent(site: Mapping[str, Any]) -> bool:
    return site["type"] == "sample" and not site["is_observed"]


def _length(batch: Batch) -> int:
    return jax.tree_util.tree_leaves(batch)[0].shape[0]


def _check_sites(
    handlers: Any, model: Callable[..., Any], params: Mapping[str, Any], data: tuple[Any, ...]
) -> set[str]:
    """Hold the sites to what a loss of batches takes for granted; return the latent names."""
    sites = _sites(handlers, model, data, _length(data))
    latent = {name: site for name, site in sites.items() if _is_latent(site)}
    for name, site in latent.items():
        if site["fn"].support.is_discrete:
            raise DataError(
                f"the latent site {name!r} is discrete, and has no posterior density to move in. "
                "Sum it out, for example by a mixture distribution."
            )
    _check_names(params, sites, latent)
    if not any(site["type"] == "sample" and site["is_observed"] for site in sites.values()):
        raise DataError("the model observes nothing. Pass the data as obs=... of a sample site.")
    plates = {n: site["args"] for n, site in sites.items() if site["type"] == "plate"}
    for name, (size, subsample) in plates.items():
        if subsample is not None and size != subsample:
            raise DataError(
                f"the plate {name!r} draws {subsample} of its {size} examples. Leave out "
                "subsample_size: an estimate draws batches itself."
            )
    if _length(data) > 1:
        _check_batches(handlers, model, latent, data)
    return set(latent)


def _check_names(
    params: Mapping[str, Any], sites: Mapping[str, Any], latent: Mapping[str, Any]
) -> None:
    free = {name for name, site in sites.items() if site["type"] == "param"}
    missing, others = sorted(set(latent) - set(params)), sorted(set(params) - set(latent) - free)
    if not missing and not others:
        return
    kinds = {name: sites[name]["type"] if name in sites else "no site" for name in others}
    kinds = {name: "observed" if kind == "sample" else kind for name, kind in kinds.items()}
    raise DataError(
        f"params must hold the latent sites {sorted(latent)}"
        + (f", and may hold the param sites {sorted(free)}" if free else "")
        + (f"; it lacks {', '.join(missing)}" if missing else "")
        + ("; leave out " if others else "")
        + ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
        + "."
    )


def _check_batches(
    handlers: Any, model: Callable[..., Any], latent: Mapping[str, Any], data: tuple[Any, ...]
) -> None:
    """Refuse a model whose latent sites, or whose plates, are of a certain number of examples."""
    fewer = _length(data) - 1
    try:
        sites = _sites(handlers, model, data, fewer)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the model runs on all {fewer + 1} examples and not on {fewer}. It must take batches "
            'of any length, as in numpyro.plate("data", inputs.shape[0]).'
        ) from error
    for name, site in latent.items():
        if name not in sites or sites[name]["value"].shape != site["value"].shape:
            raise DataError(
                f"the latent site {name!r} has the shape {site['value'].shape} on all data and "
                "another on a batch: one for each example. Integrate it out."
            )


def _sites(
    handlers: Any, model: Callable[..., Any], data: tuple[Any, ...], length: int
) -> dict[str, Any]:
    """Return the sites of the model on so many examples, with shapes for values."""
    found: dict[str, Any] = {}

    def run(*batch: Any) -> None:
        found.update(handlers.trace(model).get_trace(*batch))

    leaves = jax.tree_util.tree_map(
        lambda leaf: jax.ShapeDtypeStruct((length, *leaf.shape[1:]), leaf.dtype), data
    )
    jax.eval_shape(run, *leaves)
    return found
