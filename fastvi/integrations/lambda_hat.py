"""fastvi inside lambda_hat.

`install()` makes an unchanged run of it use `fastvi.fit` for its VI algorithms.

lambda_hat calls an algorithm once plainly, for its timings and its work, and once more inside
`jax.vmap` over the chains' keys, for the numbers. What runs is therefore a fit of fixed length that
can be traced.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from fastvi._errors import UnavailableError
from fastvi._optional import MissingExtraError
from fastvi.api.flat import fit
from fastvi.config import VIConfig
from fastvi.families import FAMILIES

ALGORITHMS = ("mfa", "flow")
# What lambda_hat does itself or says by an argument: the whitening pre-pass, TensorBoard, gamma,
# the dtype of w*. Its sigma_perp of 1e-3 in every run would leave the directions off the flow out;
# fastvi begins at the posterior's own width there.
_CLIENTS_OWN = {
    "algo",
    "family",
    "whitening_mode",
    "whitening_decay",
    "use_whitening",
    "tensorboard",
    "gamma",
    "dtype",
    "sigma_perp",
}
# Evaluation draws come in mirrored pairs, and an error takes two of these.
_LEAST_DRAWS = 4

Factory = Callable[[], Any]
_replaced: dict[str, Factory | None] = {}


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """A VI algorithm under lambda_hat's contract, run by `fastvi.fit`."""

    name: str

    def run(
        self,
        *,
        rng_key: Any,
        objective: Any,
        loss_full_flat: Callable[..., Any],
        wstar_flat: Any,
        data: Any,
        n_data: int,
        beta: Any,
        gamma: Any,
        vi_cfg: Any,
        whitener: Any = None,
    ) -> dict[str, Any]:
        """Fit one chain, see `fastvi.fit`.

        Args:
            rng_key: Typed key of the chain.
            objective: Mean loss of a batch and its gradient on the flat vector.
            loss_full_flat: Mean loss of all data.
            wstar_flat: w*; its dtype is that of the fit.
            data: (X, Y).
            n_data: Number of examples.
            beta: Inverse temperature.
            gamma: Strength of the localizer.
            vi_cfg: lambda_hat's configuration; keys that it lacks take fastvi's defaults.
            whitener: The outcome of lambda_hat's pre-pass.

        Returns:
            lambda_hat, traces, extras, timings and work.
        """
        config = translate(vi_cfg, self.name, int(n_data), jnp.result_type(wstar_flat))
        result = fit(
            rng_key=rng_key,
            objective=objective,
            loss_full_flat=loss_full_flat,
            wstar_flat=wstar_flat,
            data=data,
            n_data=int(n_data),
            beta=beta,
            gamma=gamma,
            vi_cfg=config,
            whitener=whitener,
        )
        if self.name == "flow":
            elbo = result["traces"]["elbo"]
            result["traces"]["d_latent"] = jnp.full_like(
                elbo, config.family_settings.latent_dim(wstar_flat.size)
            )
        # lambda_hat, which maps over keys, would hold all of q for every chain.
        del result["extras"]["q"]
        return {**result, "work": {**result["work"], "sampler_flavour": self.name}}


def translate(vi_cfg: Any, algorithm: str, num_data: int, dtype: Any) -> VIConfig:
    """Read lambda_hat's configuration.

    It is one for all of its algorithms: what this one has no use for is left aside. A minibatch
    larger than the data becomes all data, and evaluation draws are made an even number of at least
    4. Entries that fastvi does not know are left to lambda_hat.

    Args:
        vi_cfg: A DictConfig, mapping, dataclass or namespace, in which entries may be missing.
        algorithm: "mfa" or "flow".
        num_data: Number of examples.
        dtype: Dtype of w*.
    """
    names = {field.name for field in dataclasses.fields(VIConfig)} | {
        "flow_type",
        "flow_depth",
        "flow_hidden",
    }
    wanted = {name for name in names - _CLIENTS_OWN if algorithm == "flow" or "flow" not in name}
    # A DictConfig is a mapping, whose entries alone are settings: it has methods besides.
    if isinstance(vi_cfg, Mapping):
        given = {name: vi_cfg[name] for name in wanted if name in vi_cfg}
    else:
        given = {name: getattr(vi_cfg, name) for name in wanted if hasattr(vi_cfg, name)}
    if isinstance(draws := given.get("eval_samples"), int):
        given["eval_samples"] = max(_LEAST_DRAWS, draws + draws % 2)
    if isinstance(batch := given.get("batch_size"), int):
        given["batch_size"] = min(batch, num_data)
    # `fastvi.fit` refuses any other.
    given.setdefault("method", "variational")
    return VIConfig.create(given, family=algorithm, dtype=str(jnp.dtype(dtype))).recorded


def install() -> tuple[str, ...]:
    """Register fastvi under the names of lambda_hat's VI algorithms, for this process.

    Returns:
        The names that fastvi now answers to: "mfa", and "flow" where this fastvi has the family.

    Raises:
        MissingExtraError: If lambda_hat is not installed.
    """
    registry = _registry()
    names = tuple(name for name in ALGORITHMS if name in FAMILIES)
    for name in names:
        # A second call finds fastvi's own there, which is not to be put back.
        _replaced.setdefault(name, registry._REGISTRY.get(name))
        registry.register(name, functools.partial(Algorithm, name))
    return names


def uninstall() -> None:
    """Put back what `install` replaced.

    Raises:
        UnavailableError: If fastvi is not installed in lambda_hat.
    """
    if not _replaced:
        raise UnavailableError(
            "there is nothing to put back: fastvi is not installed in lambda_hat. Call install()."
        )
    registry = _registry()
    while _replaced:
        name, factory = _replaced.popitem()
        if factory is None:
            del registry._REGISTRY[name]
        else:
            registry.register(name, factory)


def _registry() -> Any:
    """Return lambda_hat's registry, its own algorithms registered.

    They would otherwise replace ours later.
    """
    try:
        registry = importlib.import_module("lambda_hat.vi.registry")
        # Its import registers lambda_hat's own algorithms.
        importlib.import_module("lambda_hat.vi.flow")
    except ModuleNotFoundError as error:
        # A package that lambda_hat lacks is named by its own error.
        if error.name != "lambda_hat":
            raise
        url = "git+https://github.com/danmackinlay/lambda_hat@variational"
        raise MissingExtraError(
            f'fastvi.integrations.lambda_hat needs lambda_hat: pip install "{url}"'
        ) from error
    return registry
