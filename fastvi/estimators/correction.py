"""From a fitted q to the posterior's own number: Hamiltonian Monte Carlo from q, with virial control variates."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Float, Int, Keys
from fastvi.estimators.hmc import FIRST_STEP, Record, Tuning, Walker, make_potential, run_trajectories
from fastvi.families.base import AbstractFamily, LinearMap
from fastvi.inference.loop import Problem
from fastvi.objective import FlatObjective

ROUND = 10  # trajectories between looks
MAX_BLOCKS = 12  # parameter blocks with a virial column of their own
WALK_BLOCK = 2**31 + 2**17  # counters of a chain's key beyond those of its evaluation


class Walk(NamedTuple):
    """Where the walkers are."""

    maps: LinearMap
    walkers: Walker
    tuning: Tuning
    keys: Keys


def start_walk(
    family: AbstractFamily,
    objective: FlatObjective,
    problem: Problem,
    params: Any,
    keys: Keys,
    reference_loss,
    per_chain,
) -> Walk:
    """Draw `per_chain` walkers from the q of every chain."""
    evaluate = make_potential(objective, problem, reference_loss)

    def chain(chain_params, key):
        linear_map = family.linear_map(chain_params)
        draws = family.sample(chain_params, key, per_chain, antithetic=False, block=WALK_BLOCK)
        return jax.vmap(lambda v: evaluate(linear_map, linear_map.round(v)))(draws.displacement), linear_map

    walkers, maps = jax.vmap(chain)(params, keys)
    flat = jax.tree_util.tree_map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), walkers)
    repeated = jax.tree_util.tree_map(lambda leaf: jnp.repeat(leaf, per_chain, axis=0), maps)
    walk_keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, WALK_BLOCK), per_chain))(keys)
    dim = problem.posterior.center.size
    step = jnp.log(FIRST_STEP * dim**-0.25).astype(problem.posterior.center.dtype)
    return Walk(repeated, flat, Tuning(step, jnp.asarray(0)), walk_keys.reshape(-1))


def walk_round(
    objective: FlatObjective,
    problem: Problem,
    blocks: tuple[int, ...],
    walk: Walk,
    reference_loss,
    first: Int[Array, ""],
) -> tuple[Walk, Record, Int[Array, ""]]:
    """Run `ROUND` trajectories of every walker."""
    evaluate = make_potential(objective, problem, reference_loss)
    walkers, tuning, record, spent = run_trajectories(
        evaluate, walk.maps, walk.walkers, walk.tuning, walk.keys, first, virial_columns(blocks), ROUND
    )
    llc = problem.posterior.learning_coefficient(record.llc)
    return Walk(walk.maps, walkers, tuning, walk.keys), record._replace(llc=llc), spent


def virial_columns(blocks: tuple[int, ...]) -> Callable[..., Float[Array, " columns"]]:
    """Return functions of mean zero under the posterior: `tr G - (G v) . grad(-log p)` for a few fixed G.

    G is the identity on each parameter block, and the projection on the span of q's low-rank directions; one more
    column is the slope along q's mean.

    Args:
        blocks: Lengths of the blocks, in order.
    """
    ends = np.cumsum(blocks)
    starts = ends - np.asarray(blocks)

    def columns(displacement, walker: Walker, pulled, linear_map: LinearMap):
        work = displacement * walker.gradient
        own = [stop - start - jnp.sum(work[start:stop]) for start, stop in zip(starts, ends, strict=True)]
        along = linear_map.basis.shape[0] - (linear_map.basis @ walker.x) @ (linear_map.basis @ pulled)
        return jnp.stack([*own, along, linear_map.center @ walker.gradient])

    return columns


def parameter_blocks(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Merge neighbouring leaves until at most `MAX_BLOCKS` are left."""
    merged = list(sizes)
    while len(merged) > MAX_BLOCKS:
        pairs = [a + b for a, b in zip(merged, merged[1:], strict=False)]
        at = int(np.argmin(pairs))
        merged[at : at + 2] = [pairs[at]]
    return tuple(merged)


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What a run says: the mean after burn-in, its error, and whether to believe it."""

    llc: float
    llc_sem: float
    rhat: float
    variance_reduction: float
    burn_in: int
    per_walker: np.ndarray


def analyse(llc: Float[np.ndarray, "walkers trajectories"], virial: np.ndarray) -> Analysis:
    """Average a run after its burn-in, with virial control variates.

    Coefficients come from the other half of the walkers. The error is the larger of that from the spread between
    walkers and that from the autocorrelation within them.
    """
    burn = burn_in(llc)
    kept, columns = llc[:, burn:], virial[:, burn:]
    adjusted = _adjust(kept, columns)
    per_walker = adjusted.mean(axis=1)
    sem = _sem(adjusted)
    return Analysis(
        llc=float(per_walker.mean()),
        llc_sem=sem,
        rhat=split_rhat(adjusted),
        variance_reduction=float(kept.var() / max(adjusted.var(), 1e-300)),
        burn_in=burn,
        per_walker=per_walker,
    )


def burn_in(llc: np.ndarray) -> int:
    """Return the truncation that minimises the squared error of the mean (MSER), at most half of the run.

    References:
        White, An Effective Truncation Heuristic for Bias Reduction in Simulation Output (1997).
    """
    series = llc.mean(axis=0)
    candidates = range(series.size // 2 + 1)
    scores = [np.sum((series[t:] - series[t:].mean()) ** 2) / (series.size - t) ** 2 for t in candidates]
    return int(np.argmin(scores))


def _adjust(values: np.ndarray, columns: np.ndarray) -> np.ndarray:
    halves = np.arange(values.shape[0]) % 2 == 0
    if halves.all() or halves.sum() * values.shape[1] < 5 * (columns.shape[-1] + 1):
        return values
    result = np.empty_like(values)
    for mine in (halves, ~halves):
        other = columns[~mine].reshape(-1, columns.shape[-1])
        target = values[~mine].ravel()
        spread = other.std(axis=0)
        spread = np.where(spread > 0, spread, 1.0)
        design = np.column_stack([np.ones(target.size), other / spread])
        slopes = np.linalg.lstsq(design, target, rcond=1e-6)[0][1:] / spread
        result[mine] = values[mine] - columns[mine] @ slopes
    return result


def _sem(values: np.ndarray) -> float:
    walkers, length = values.shape
    between = values.mean(axis=1).std(ddof=1) / np.sqrt(walkers) if walkers > 1 else 0.0
    centred = values - values.mean()
    variance = np.mean(centred**2)
    if variance == 0:
        return 0.0
    time, total = 1.0, 1.0
    for lag in range(1, length // 2):  # initial positive sequence, chains averaged
        rho = np.mean(centred[:, lag:] * centred[:, :-lag]) / variance
        if rho < 0.05:
            break
        total += 2 * rho
        time = total
    within = np.sqrt(variance * time / values.size)
    return float(max(between, within))


def split_rhat(values: np.ndarray) -> float:
    """Compare means of half-walkers with the variance within them; 1 where they agree."""
    half = values.shape[1] // 2
    if half < 2:
        return float("inf")
    parts = np.concatenate([values[:, :half], values[:, -half:]])
    within = parts.var(axis=1, ddof=1).mean()
    between = half * parts.mean(axis=1).var(ddof=1)
    return float(np.sqrt(((half - 1) / half * within + between / half) / within)) if within > 0 else 1.0
