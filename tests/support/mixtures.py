"""Families of mixtures with parameters of order one, and their dense algebra."""

import jax
import jax.numpy as jnp
import numpy as np

from fastvi.families.mfa import MFA, MFAParams

MEANS = ("shared", "center", "component")


def make(means="shared", dim=5, ranks=(2, 0, 1), num_core=3, core_mask=None, seed=0, **options):
    """A family with a nontrivial scale and parameters of order one."""
    rng = np.random.default_rng(seed)
    family = MFA(
        scale=jnp.asarray(np.exp(rng.normal(size=dim))),
        core_mask=jnp.ones(num_core) if core_mask is None else jnp.asarray(core_mask, float),
        lr_factor=jnp.ones(()),
        ranks=tuple(ranks),
        means=means,
        noise_size=num_core + 1,
        **options,
    )
    params = MFAParams(
        logits=jnp.asarray(rng.normal(size=len(ranks))),
        offsets=jnp.asarray(0.7 * rng.normal(size=(family.num_offsets, dim))),
        log_scale=jnp.asarray(0.5 * rng.normal(size=dim)),
        core=jnp.asarray(rng.normal(size=(num_core, dim))),
        factors=jnp.asarray(rng.normal(size=(len(ranks), max(ranks), dim))),
    )
    return family, params


def dense(family, params):
    """Weights, means and covariances in model coordinates, from docs/math.md "Family".

    Of NumPy or traced.
    """
    dim = family.scale.size
    core = params.core * family.core_mask[:, None]
    inner = jnp.linalg.inv(jnp.eye(dim) + core.T @ core)
    deviation = family.scale * jnp.exp(params.log_scale)
    covariances = []
    for rank, factor in zip(family.ranks, params.factors, strict=True):
        covariances.append(
            deviation[:, None] * (inner + factor[:rank].T @ factor[:rank]) * deviation
        )
    means = [jnp.zeros(dim)] * len(family.ranks)
    if family.means != "center":
        means = [
            family.scale * params.offsets[m if family.means == "component" else 0]
            for m in range(len(means))
        ]
    weights = jnp.exp(params.logits / family.temperature)
    return weights / weights.sum(), jnp.stack(means), jnp.stack(covariances)


def assert_tree_close(actual, expected, rtol):
    assert jax.tree_util.tree_structure(actual) == jax.tree_util.tree_structure(expected)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(actual),
        jax.tree_util.tree_leaves(expected),
        strict=True,
    ):
        scale = np.max(np.abs(want), initial=1e-300)
        np.testing.assert_allclose(
            got, want, rtol=0, atol=rtol * scale, err_msg=jax.tree_util.keystr(path)
        )
