"""Peers that fit a q by minibatches.

Normals of numpyro and blackjax, a flow of FlowJAX; their llc is that of q.

Every fit starts at w* with the width of the steepest direction and takes Adam, whose step falls to
zero by a cosine.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench.bench_step import numpyro_guide
from bench.truth.problem import Problem
from bench.truth.samplers import BATCH
from fastvi.evaluation.llc import losses_at
from fastvi.target.data import Problem as Minibatches
from fastvi.target.data import hold, shared_mean
from fastvi.target.posterior import LocalPosterior
from fastvi.target.ravel import ravel_loss
from fastvi.target.work import LOSS

RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # of Adam; the ELBO chooses
STEP_DRAWS, FLOW_DRAWS = 4, 16  # of a step: of a normal as many as the samplers have chains
DRAWS = 1024  # of the evaluation on all data
LARGEST, LARGEST_DENSE = 2_000, 200  # dimensions: of all; of a full covariance or a flow
RANK = 16
LAYERS, WIDTH, KNOTS, INTERVAL = 8, 50, 8, 5.0  # of the flow: FlowJAX's defaults, with splines


class Task(NamedTuple):
    """What a fit is given.

    The loss, target and data, the optimizer, steps and their draws, the width at the start.
    """

    objective: Any
    problem: Minibatches
    optimizer: optax.GradientTransformation
    steps: int
    draws: int
    scale: float

    def run(self, step: Callable, state: Any, key: Any) -> Any:
        """Scan `(state, batch, key) -> state`."""

        def body(state, key):
            key_batch, key_step = jax.random.split(key)
            return step(state, self.problem.next_batch(key_batch), key_step), None

        return jax.lax.scan(body, state, jax.random.split(key, self.steps))[0]

    def log_density(self, w, batch):
        """Evaluate the target with the loss of a batch."""
        posterior = self.problem.posterior
        return posterior.log_density(w - posterior.center, self.objective.loss(w, batch))


class Peer(NamedTuple):
    """A fit `(task, key) -> draws, log q`, its largest dimension and the draws of a step."""

    run: Callable
    largest: int
    step_draws: int


class Fit(NamedTuple):
    """What a fitted q says: the ELBO on all data, the llc and its Monte Carlo error."""

    elbo: float
    llc: float
    sem: float
    fge: float
    seconds: float


def numpyro_normal(task: Task, key, guide: str, **options):
    """Fit a guide of numpyro; return draws and log q."""
    import numpyro

    optimizer = numpyro.optim.optax_to_numpyro(task.optimizer)
    svi = numpyro_guide(
        task.objective,
        task.problem,
        guide,
        optimizer,
        draws=task.draws,
        init_scale=task.scale,
        **options,
    )
    key_start, key_steps, key_draws = jax.random.split(key, 3)
    state = svi.init(key_start, task.problem.next_batch(key_start))
    state = task.run(lambda state, batch, key: svi.update(state, batch)[0], state, key_steps)
    params = svi.get_params(state)
    if guide == "AutoNormal":
        q = numpyro.distributions.Normal(params["w_auto_loc"], params["w_auto_scale"]).to_event(1)
    else:
        q = svi.guide.get_posterior(params)
    draws = q.sample(key_draws, (DRAWS,))
    return draws, q.log_prob(draws)


def blackjax_normal(task: Task, key):
    """Fit blackjax's mean-field normal; return draws and log q."""
    import blackjax

    def fit_on(batch):
        log_density = functools.partial(task.log_density, batch=batch)
        return blackjax.meanfield_vi(log_density, task.optimizer, num_samples=task.draws)

    center = task.problem.posterior.center
    start = fit_on(task.problem.data.examples).init(center)
    start = start._replace(mu=center, rho=jnp.full_like(center, math.log(task.scale)))
    key_steps, key_draws = jax.random.split(key)
    state = task.run(lambda state, batch, key: fit_on(batch).step(key, state)[0], start, key_steps)
    noise = jax.random.normal(key_draws, (DRAWS, center.size))
    log_q = (
        -0.5 * jnp.sum(noise**2, axis=1)
        - jnp.sum(state.rho)
        - 0.5 * center.size * math.log(2 * math.pi)
    )
    return state.mu + jnp.exp(state.rho) * noise, log_q


def flowjax_flow(task: Task, key):
    """Fit a coupling flow of splines by FlowJAX's ELBO; return draws and log q."""
    import equinox as eqx
    import paramax
    from flowjax import bijections, distributions, flows
    from flowjax.train.losses import ElboLoss

    center = task.problem.posterior.center
    key_start, key_steps, key_draws = jax.random.split(key, 3)
    splines = flows.coupling_flow(
        key_start,
        base_dist=distributions.Normal(jnp.zeros_like(center)),
        transformer=bijections.RationalQuadraticSpline(knots=KNOTS, interval=INTERVAL),
        flow_layers=LAYERS,
        nn_width=WIDTH,
        invert=False,
    )
    flow = distributions.Transformed(
        splines, bijections.Affine(center, jnp.full_like(center, task.scale))
    )
    params, static = eqx.partition(
        flow, eqx.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )

    def step(state, batch, key):
        params, inner = state
        loss = ElboLoss(functools.partial(task.log_density, batch=batch), task.draws)
        updates, inner = task.optimizer.update(jax.grad(loss)(params, static, key), inner, params)
        return optax.apply_updates(params, updates), inner

    params, _ = task.run(step, (params, task.optimizer.init(params)), key_steps)
    return paramax.unwrap(eqx.combine(params, static)).sample_and_log_prob(key_draws, (DRAWS,))


def _guide(name, **options):
    return functools.partial(numpyro_normal, guide=name, **options)


PEERS = {
    "numpyro_normal": Peer(_guide("AutoNormal"), LARGEST, STEP_DRAWS),
    "numpyro_low_rank": Peer(
        _guide("AutoLowRankMultivariateNormal", rank=RANK), LARGEST, STEP_DRAWS
    ),
    "numpyro_dense": Peer(_guide("AutoMultivariateNormal"), LARGEST_DENSE, STEP_DRAWS),
    "blackjax_meanfield": Peer(blackjax_normal, LARGEST, STEP_DRAWS),
    "flowjax_coupling": Peer(flowjax_flow, LARGEST_DENSE, FLOW_DRAWS),
}


def is_possible(problem: Problem, name: str) -> bool:
    """Whether the peer takes a problem of this dimension."""
    return 1 < problem.dim <= PEERS[name].largest


def fits(problem: Problem, name: str, seeds: Sequence[int], budget: float) -> dict[int, Fit]:
    """Fit with every step size.

    Return the one of largest ELBO for each seed, which anyone can choose.

    Cost:
        The budget: a minibatch gradient for each draw of a step, DRAWS losses on all data. The
        other step sizes do not count.
    """
    batch, peer = min(BATCH, problem.n_data), PEERS[name]
    share = peer.step_draws * batch / problem.n_data
    evaluation = LOSS * (DRAWS + 1)
    steps = int((budget - evaluation) / share)
    run = _compiled(problem, peer, steps, batch)
    grid = [(rate, seed) for rate in RATES for seed in seeds]
    keys = jnp.stack([jax.random.key(seed) for _, seed in grid])
    began = time.perf_counter()
    found = np.stack(run(jnp.asarray([rate for rate, _ in grid]), keys), axis=1).astype(float)
    elapsed = (time.perf_counter() - began) / len(grid)
    best: dict[int, Fit] = {}
    for (_, seed), (elbo, llc, sem) in zip(grid, found, strict=True):
        fit = Fit(elbo, llc, sem, evaluation + share * steps, elapsed)
        if seed not in best or fit.elbo > best[seed].elbo or math.isnan(best[seed].elbo):
            best[seed] = fit
    return best


def _compiled(problem: Problem, peer: Peer, steps: int, batch: int):
    """Compile `(rates, keys) -> ELBO, llc and its error`, every pair side by side."""
    objective, center = ravel_loss(problem.loss_fn, problem.params)
    data = jax.tree_util.tree_map(jnp.asarray, problem.batch())
    posterior = LocalPosterior(center, jnp.float32(problem.nbeta), jnp.float32(problem.gamma))
    scale = (problem.nbeta + problem.gamma) ** -0.5

    def one(minibatches, reference, rate, key):
        optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
        draws, log_q = peer.run(
            Task(objective, minibatches, optimizer, steps, peer.step_draws, scale), key
        )
        shared = (center, draws - center)
        at_draws = functools.partial(losses_at, objective)
        excess = shared_mean(at_draws, minibatches.data, shared).excess
        log_p = jax.vmap(posterior.log_density)(draws - center, reference + excess)
        values = posterior.learning_coefficient(excess)
        return jnp.mean(log_p - log_q), jnp.mean(values), jnp.std(values, ddof=1) / math.sqrt(DRAWS)

    @jax.jit
    def run(minibatches, rates, keys):
        reference = minibatches.data.mean(lambda batch: objective.loss(center, batch))
        return jax.vmap(functools.partial(one, minibatches, reference))(rates, keys)

    return functools.partial(run, Minibatches(posterior, hold(data), batch))
