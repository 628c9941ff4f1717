"""Walkers: where they start, how they pass from one posterior to another, and which ones stay."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fastvi._devices import BY_WALKER, SHARED, Layout, off_devices
from fastvi._typing import Array, Float, Int, Key, Keys
from fastvi.families.base import AbstractFamily
from fastvi.families.moments import LinearMap
from fastvi.kernels.noise import normal, split_key, streams
from fastvi.sampling.tuning import StepSize, first_step_size, fresh_step_size
from fastvi.target.data import Problem

# Part of q's draws that must count when walkers are chosen among them. Half lets fewer draws become
# more walkers; at 1, weights count for nothing.
EFFECTIVE_SHARE = 0.5


class Walkers(NamedTuple):
    """Walkers side by side: their coordinates, where they are, and how they move.

    `excess` is L_n(w) - L_n(w*) at each of them, as it was last estimated; `owed` is as in
    `fastvi.sampling.dynamics.State`.
    """

    linear_map: LinearMap
    position: Float[Array, "walkers dim"]
    momentum: Float[Array, "walkers dim"]
    excess: Float[Array, " walkers"]
    step_size: StepSize
    keys: Keys
    owed: Float[Array, " walkers"]


# How walkers lie on devices that they are divided over.
DEALT = Walkers._make((SHARED, BY_WALKER, BY_WALKER, BY_WALKER, SHARED, BY_WALKER, BY_WALKER))
OF_EACH = tuple(name for name, spec in DEALT._asdict().items() if spec == BY_WALKER)


def deal_walkers(walkers: Walkers, layout: Layout) -> Walkers:
    """Put walkers on the devices that they are divided over."""
    number = walkers.position.shape[0]
    return Walkers._make(
        layout.deal(part, number) if name in OF_EACH else layout.share(part)
        for name, part in walkers._asdict().items()
    )


def collect_walkers(walkers: Walkers, layout: Layout) -> Walkers:
    """Take walkers back from the devices, as arrays that any program takes."""
    if layout.mesh is None:
        return walkers
    return jax.tree_util.tree_map(off_devices, walkers)


def place_walkers(
    family: AbstractFamily,
    problem: Problem,
    params: Any,
    keys: Keys,
    log_weight: Float[Array, "chains draws"],
    excess: Float[Array, "chains draws"],
    num_walkers: int,
) -> Walkers:
    """Place walkers at draws from the q of every chain, chosen by their weight under the posterior.

    Args:
        family: That of q.
        problem: The target.
        params: Parameters of q, with a leading axis of chains.
        keys: Keys of the chains, whose evaluation made the draws.
        log_weight: Log importance weights of these draws.
        excess: L_n(w) - L_n(w*) at these draws.
        num_walkers: A multiple of the chains.

    Cost:
        No gradient: the draws have been evaluated.
    """
    chains, num_draws = log_weight.shape
    linear_map = _common_map(family, params)

    def chain(inputs):
        chain_params, key, weights, energies = inputs
        # The key makes the draws of the evaluation anew, whose weights and energies are at hand.
        draws = family.sample(
            chain_params, key, num_draws, antithetic=True, block=streams.EVALUATION
        )
        choice = streams.derive(key, streams.Purpose.RESAMPLING)
        chosen = resample(choice, weights, num_walkers // chains)
        return linear_map.round(draws.displacement[chosen]), energies[chosen]

    # one chain after the other, since all draws of all chains need not fit the memory
    position, energies = jax.lax.map(chain, (params, keys, log_weight, excess))
    position = position.reshape(num_walkers, -1)
    walker_keys = split_key(streams.derive(keys[0], streams.Purpose.WALKERS), num_walkers)
    step_size = first_step_size(position.shape[1], position.dtype)
    momentum = _fresh_momentum(walker_keys, position)
    energies = energies.reshape(-1)
    owed = jnp.zeros_like(energies, position.dtype)
    return Walkers(linear_map, position, momentum, energies, step_size, walker_keys, owed)


def move_walkers(
    family: AbstractFamily,
    problem: Problem,
    params: Any,
    walkers: Walkers,
    center: Float[Array, " dim"],
    shift: Int[Array, ""],
) -> Walkers:
    """Take walkers over to another posterior: to the coordinates of its q, where they are.

    Args:
        family: That of the new q.
        problem: The new target.
        params: Parameters of the new q, with a leading axis of chains.
        walkers: The walkers.
        center: The w* that they were about.
        shift: Distinguishes their keys from the old ones.
    """
    linear_map = _common_map(family, params)
    displacement = walkers.linear_map.displacement(walkers.position)
    position = linear_map.round(displacement + (center - problem.posterior.center))

    def moved_key(key):
        return jax.random.fold_in(streams.derive(key, streams.Purpose.WALKERS), shift)

    # other keys, else the noise of the earlier run would be used twice
    keys = jax.vmap(moved_key)(walkers.keys)
    # the old step size is a better guess than none, its running means are of another posterior
    step_size = fresh_step_size(walkers.step_size.step)
    momentum, owed = _fresh_momentum(keys, position), jnp.zeros_like(walkers.owed)
    return Walkers(linear_map, position, momentum, walkers.excess, step_size, keys, owed)


def keep_walkers(walkers: Walkers, number: int, chains: int) -> Walkers:
    """Keep so many walkers, as many from each chain."""

    def first(leaf):
        parts = leaf.reshape(chains, -1, *leaf.shape[1:])[:, : number // chains]
        return parts.reshape(number, *leaf.shape[1:])

    return walkers._replace(**{name: first(getattr(walkers, name)) for name in OF_EACH})


def resample(key: Key, log_weight: Float[Array, " candidates"], num: int) -> Int[Array, " num"]:
    """Choose `num` candidates by importance weights.

    Log weights are halved until `EFFECTIVE_SHARE` of the candidates count.
    """
    # a draw where the loss is not finite never becomes a walker
    log_weight = jnp.where(jnp.isfinite(log_weight), log_weight, -jnp.inf)
    log_weight = log_weight - jnp.max(log_weight)
    # The power of zero makes weights equal where no halving leaves enough candidates.
    powers = jnp.append(2.0 ** -jnp.arange(10), 0.0).astype(log_weight.dtype)
    flattened = jnp.where(jnp.isfinite(log_weight), powers[:, None] * log_weight, -jnp.inf)
    weights = jax.nn.softmax(flattened, axis=-1)
    effective = 1 / jnp.sum(weights**2, axis=-1)
    enough = effective >= EFFECTIVE_SHARE * log_weight.size
    chosen = flattened[jnp.argmax(enough.at[-1].set(True))]  # equal weights always do
    return jax.random.categorical(key, chosen, shape=(num,))


def _common_map(family: AbstractFamily, params: Any) -> LinearMap:
    """Return the coordinates of the first chain's q, which all walkers share."""
    return family.linear_map(jax.tree_util.tree_map(lambda leaf: leaf[0], params))


def _fresh_momentum(keys: Keys, position: Float[Array, "walkers dim"]):
    shape, dtype = position.shape[1:], position.dtype
    return jax.vmap(lambda key: normal(key, shape, dtype, block=streams.MOMENTUM))(keys)
