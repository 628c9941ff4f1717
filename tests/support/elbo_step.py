"""Definition of a step of one chain.

Dense covariances, autodiff, every gradient and rule written out. For tests.

It takes arrays, numbers and the target's log density, one chain and one step at a time, and leaves
the bound on scales out. Parameters, gradients and moments are mappings by name: logits, offsets,
log_scale, core, factors.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import entr, logsumexp

from fastvi.kernels.mixture_grad import reference as mixture_grad
from fastvi.kernels.woodbury import reference as woodbury
from fastvi.kernels.woodbury.types import Mixture, Noise

Arrays = Mapping[str, Any]
ROWS = ("offsets", "core", "factors")  # whose rows share a second moment


class Setting(NamedTuple):
    """What stays the same over the steps.

    Attributes:
        scale: S^{-1}, the length of a whitened unit.
        core_mask: 1 for rows of the core in use.
        rank_mask: 1 for rows of each component's factor in use.
        temperature: T in pi = softmax(logits / T).
        dirichlet: alpha_0 of the prior on pi.
        entropy_weight: 1 + lambda_H.
        lazy: Whether a draw moves the factor of its own component alone, which then has no first
            moment.
        max_ratio: Largest norm of a gradient, in units of the typical one.
        typical_decay: Decay of the typical squared norm.
        truncation: Steps after which the bound on the norm starts to grow.
        decays: Adam's two decays.
        damping: Size of a gradient below which steps shrink with it.
        rates: Factor on the learning rate by parameter.
        baseline_decay: Decay of the baseline of the logits' gradient.
    """

    scale: Any
    core_mask: Any
    rank_mask: Any
    temperature: float
    dirichlet: float
    entropy_weight: float
    lazy: bool
    max_ratio: float
    typical_decay: float
    truncation: float
    decays: tuple[float, float]
    damping: float
    rates: Mapping[str, float]
    baseline_decay: float


class Chain(NamedTuple):
    """What a step reads and leaves.

    `unseen` is the weight that the zeros of the start still have in the mean and in the square,
    `own_unseen` that in the square of each component's factor, `typical` the running mean of
    squared norms.
    """

    params: Arrays
    mean: Arrays
    square: Arrays
    unseen: tuple[Any, Any]
    own_unseen: Any
    typical: Any
    baseline: Any
    count: Any


class Term(NamedTuple):
    """What a draw contributes."""

    value: Any  # log p
    log_prob: Any
    responsibilities: Any
    displacement: Any
    value_grad: Any


def start(params: Arrays) -> Chain:
    """Return the chain before its first step."""
    mean = {name: jnp.zeros_like(leaf) for name, leaf in params.items()}
    square = {name: leaf[..., :1] if name in ROWS else leaf for name, leaf in mean.items()}
    zero, one = jnp.zeros(()), jnp.ones(())
    return Chain(
        params,
        mean,
        square,
        (one, one),
        jnp.ones(params["factors"].shape[0]),
        zero,
        zero,
        jnp.asarray(0),
    )


def step(
    setting: Setting,
    chain: Chain,
    log_density: Callable[[Any], Any],
    groups: Sequence[Sequence[Noise]],
    rate: Any,
    elapsed: Any,
) -> tuple[Chain, Arrays]:
    """Take one step.

    Args:
        setting: The constants.
        chain: The chain.
        log_density: log p of the target on the step's batch, a function of the displacement in
            model coordinates.
        groups: The independent draws, each with its mirror image if it has one.
        rate: Learning rate.
        elapsed: Share of the decay phase that lies behind.

    Returns:
        The chain after the step, and its traces.
    """
    mixture = _mixture(setting, chain.params)
    terms, gradients = zip(
        *(_differentiate(setting, mixture, log_density, group) for group in groups), strict=True
    )
    every = jax.tree_util.tree_map(
        lambda *leaves: jnp.stack(leaves), *(term for group in terms for term in group)
    )
    baseline = jnp.where(chain.count == 0, jnp.mean(every.value - every.log_prob), chain.baseline)
    gradient = {name: sum(one[name] for one in gradients) / len(groups) for name in gradients[0]}
    gradient |= {"logits": _logits(setting, mixture, terms, baseline)}
    blocks = []
    if setting.lazy:
        del gradient["factors"]
        labels = [group[0].label for group in groups]
        blocks = [
            (label, one["factors"][label]) for label, one in zip(labels, gradients, strict=True)
        ]
    norm = jnp.sqrt(
        sum(jnp.sum(leaf**2) for leaf in [*gradient.values(), *(block for _, block in blocks)])
    )
    factor, typical = _clipping(setting, chain, norm)
    chain = _move(
        setting, chain, {name: factor * leaf for name, leaf in gradient.items()}, rate, elapsed
    )
    for label, block in blocks:
        chain = _move_block(setting, chain, label, factor * block, rate, elapsed)
    objective = jnp.mean(every.value - setting.entropy_weight * every.log_prob)
    baseline = setting.baseline_decay * baseline + (1 - setting.baseline_decay) * objective
    chain = chain._replace(typical=typical, baseline=baseline, count=chain.count + 1)
    return chain, {"grad_norm": norm, **_traces(_mixture(setting, chain.params), every)}


def _mixture(setting: Setting, params: Arrays) -> Mixture:
    logits = params["logits"] / setting.temperature
    return Mixture(
        log_weights=logits - logsumexp(logits),
        offsets=params["offsets"],
        log_scale=params["log_scale"],
        core=params["core"] * setting.core_mask[:, None],
        factors=params["factors"] * setting.rank_mask[:, :, None],
    )


def _differentiate(setting: Setting, mixture: Mixture, log_density, group: Sequence[Noise]):
    """Differentiate the mean of log p - weight log q along the path.

    The parameters inside log q are held.
    """
    held, small = jax.lax.stop_gradient(mixture), woodbury.grams(mixture)

    def objective(moving: Mixture):
        terms = []
        for noise in group:
            point = woodbury.draw(moving, small, noise).displacement
            parts = woodbury.component_log_probs(held, point)
            value, value_grad = jax.value_and_grad(log_density)(setting.scale * point)
            log_prob = logsumexp(parts) - jnp.sum(jnp.log(setting.scale))
            terms.append(
                Term(value, log_prob, jax.nn.softmax(parts), setting.scale * point, value_grad)
            )
        return sum(term.value - setting.entropy_weight * term.log_prob for term in terms) / len(
            group
        ), terms

    gradient, terms = jax.grad(objective, has_aux=True)(mixture)
    natural = mixture_grad.natural(mixture, gradient)
    return terms, {
        "offsets": natural.offsets,
        "log_scale": natural.log_scale,
        "core": natural.core * setting.core_mask[:, None],
        "factors": natural.factors * setting.rank_mask[:, :, None],
    }


def _logits(setting: Setting, mixture: Mixture, terms, baseline):
    """Sum over the label, with the mean of the other groups as baseline where there are any."""
    weights, total = jnp.exp(mixture.log_weights), 0.0
    values = [
        [term.value - setting.entropy_weight * term.log_prob for term in group] for group in terms
    ]
    means = [sum(group) / len(group) for group in values]
    for index, group in enumerate(terms):
        others = means[:index] + means[index + 1 :]
        reference = sum(others) / len(others) if others else baseline
        for term, value in zip(group, values[index], strict=True):
            total += (
                (term.responsibilities - weights) * (value - reference) / (len(terms) * len(group))
            )
    prior = (setting.dirichlet - 1) * (1 - weights.size * weights)
    return (total + prior) / setting.temperature


def _clipping(setting: Setting, chain: Chain, norm):
    """Return the factor that bounds the norm, and the new typical square.

    The bound is a growing multiple of the typical norm.
    """
    decay = setting.typical_decay
    growth = jnp.sqrt(jnp.maximum(1.0, chain.count / setting.truncation))
    bound = setting.max_ratio * growth * jnp.sqrt(chain.typical / (1 - decay**chain.count))
    clipped = jnp.where(chain.count == 0, norm, jnp.minimum(norm, bound))
    return clipped / norm, decay * chain.typical + (1 - decay) * clipped**2


def _move(setting: Setting, chain: Chain, gradient: Arrays, rate, elapsed) -> Chain:
    """Adam on what the gradient holds.

    Offsets in units of D^{1/2}, and the core moves along with D.
    """
    first, second = setting.decays
    gain = (1 - second) * (1 - elapsed) ** 2
    unseen = (first * chain.unseen[0], (1 - gain) * chain.unseen[1])
    params, mean, square, update = dict(chain.params), dict(chain.mean), dict(chain.square), {}
    for name, leaf in gradient.items():
        own = jnp.mean(leaf**2, axis=-1, keepdims=True) if name in ROWS else leaf**2
        mean[name] = first * mean[name] + (1 - first) * leaf
        square[name] = square[name] + gain * (own - square[name])
        corrected = mean[name] / (1 - unseen[0]), square[name] / (1 - unseen[1])
        update[name] = (
            rate * setting.rates[name] * corrected[0] / (jnp.sqrt(corrected[1]) + setting.damping)
        )
    scale = jnp.exp(params["log_scale"])
    update["offsets"] = scale * update["offsets"]
    params |= {name: params[name] + change for name, change in update.items()}
    params["core"] = params["core"] * jnp.exp(params["log_scale"]) / scale
    return chain._replace(params=params, mean=mean, square=square, unseen=unseen)


def _move_block(setting: Setting, chain: Chain, label, block, rate, elapsed) -> Chain:
    """Move the factor of one component by its own second moment.

    That is as old as the component's last draw.
    """
    gain = (1 - setting.decays[1]) * (1 - elapsed) ** 2
    old = chain.square["factors"][label]
    square = old + gain * (jnp.mean(block**2, axis=-1, keepdims=True) - old)
    unseen = (1 - gain) * chain.own_unseen[label]
    update = (
        rate
        * setting.rates["factors"]
        * block
        / (jnp.sqrt(square / (1 - unseen)) + setting.damping)
    )
    return chain._replace(
        params={**chain.params, "factors": chain.params["factors"].at[label].add(update)},
        square={**chain.square, "factors": chain.square["factors"].at[label].set(square)},
        own_unseen=chain.own_unseen.at[label].set(unseen),
    )


def _traces(moved: Mixture, every: Term) -> Arrays:
    weights = jnp.exp(moved.log_weights)
    slope = jnp.sum(every.displacement * every.value_grad, axis=-1)
    return {
        "elbo": jnp.mean(every.value - every.log_prob),
        "elbo_like": jnp.mean(every.value),
        "logq": jnp.mean(every.log_prob),
        "radius2": jnp.mean(jnp.sum(every.displacement**2, axis=-1)),
        "virial": -jnp.mean(slope) / every.displacement.shape[-1],
        "resp_entropy": jnp.mean(jnp.sum(entr(every.responsibilities), axis=-1)),
        "pi_min": jnp.min(weights),
        "pi_max": jnp.max(weights),
        "pi_entropy": jnp.sum(entr(weights)),
    }
