"""The loop's step against its dense definition, chain by chain."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from conftest import also_as_users_compile, quick_jit
from jax.extend.random import threefry_2x32

from fastvi import LocalPosterior, VIConfig, make_flat_objective
from fastvi.api.plan import family_choice, fit_schedule, fit_settings, start_settings
from fastvi.families import mfa
from fastvi.fitting import optimizer
from fastvi.fitting import step as loop
from fastvi.fitting.stages import build_family
from fastvi.fitting.step_plan import FINAL_RATE, Phases, plan_steps
from fastvi.kernels.woodbury import Noise
from fastvi.target.data import hold
from tests.support import elbo_step as reference
from tests.support.stand_ins import begun

DIM, NUM_DATA, BATCH, LENGTH, CHUNKS = 5, 12, 4, 3, 2
NBETA, GAMMA, LR, TRUST, WARMUP, DECAY_START, END = 3.0, 0.7, 0.05, 0.5, 2, 3, 8


class Case(NamedTuple):
    """A mixture and the draws of its steps; `options` of the configuration."""

    ranks: tuple[int, ...]
    core: int
    draws: int
    means: str = "shared"
    antithetic: bool = True
    chains: int = 2
    options: tuple[tuple[str, float], ...] = ()


CASES = {
    "gaussian": Case((0,), 0, 1, means="center"),
    "gaussian_pair": Case((3,), 2, 2),
    "core_only": Case((0, 0, 0), 2, 1, means="component"),
    "single_chain": Case((2, 2), 2, 1, chains=1),
    "two_draws": Case((3, 3, 3), 0, 2, antithetic=False),
    "mixture": Case(
        (3, 3, 3), 3, 1, options=(("alpha_dirichlet_prior", 1.5), ("entropy_bonus", 0.3))
    ),
    "mixture_pair": Case((0, 1, 3), 3, 2, means="component", options=(("alpha_temperature", 1.7),)),
    "all_factors_move": Case((2, 0), 2, 3, antithetic=False),
}


def loss(w, batch):
    inputs, outputs = batch
    return jnp.mean((jnp.tanh(inputs @ w) - outputs) ** 2) + 0.1 * jnp.sum(jnp.sin(w))


def make(case):
    """Return configuration, family, target and the chains' parameters."""
    rng, num = np.random.default_rng(0), len(case.ranks)
    config = VIConfig(
        M=num,
        r_per_component=case.ranks,
        means=case.means,
        curvature_rank=case.core,
        samples_per_step=case.draws,
        antithetic=case.antithetic if case.draws % 2 == 0 else None,
        clip_global_norm=1.05,
        lr=LR,
        batch_size=BATCH,
        eval_every=2,
        **dict(case.options),
    ).filled
    scale, core = (
        jnp.asarray(np.exp(0.3 * rng.normal(size=DIM))),
        jnp.asarray(rng.normal(size=(case.core, DIM))),
    )
    unused = min(case.core, 1)  # rows of padding
    start = begun(scale, core, case.core - unused)
    family = dataclasses.replace(
        build_family(family_choice(config), start_settings(config), start, case.core),
        lr_factor=jnp.asarray(TRUST),
    )
    data = jnp.asarray(rng.normal(size=(NUM_DATA, DIM))), jnp.asarray(rng.normal(size=NUM_DATA))
    posterior = LocalPosterior(
        jnp.asarray(rng.normal(size=DIM)), jnp.asarray(NBETA), jnp.asarray(GAMMA)
    )
    sizes = (num,), (family.num_offsets, DIM), (DIM,), (case.core, DIM), (num, max(case.ranks), DIM)
    params = mfa.MFAParams(
        *(jnp.asarray(0.5 * rng.normal(size=(case.chains, *size))) for size in sizes)
    )
    return config, family, loop.Problem(posterior, hold(data), BATCH), params


def implementation(case):
    """Run chunks of steps with the chains under vmap."""
    config, family, problem, params = make(case)
    objective, settings = make_flat_objective(loss), fit_settings(config).step

    @quick_jit
    def chunk(state, keys, plan):
        return loop.run_steps(family, objective, problem, settings, state, keys, plan)

    state = quick_jit(jax.vmap(lambda one: loop.init_state(family, one, settings)))(params)
    traces, keys = [], jax.random.split(jax.random.key(3), case.chains)
    for index in range(CHUNKS):
        plan = plan_steps(
            fit_schedule(config),
            Phases(WARMUP, DECAY_START, END),
            index * LENGTH,
            LENGTH,
            LENGTH,
            np.float64,
        )
        state, trace = chunk(state, keys, plan)
        traces.append(trace)
    return state.params._asdict(), {
        name: np.concatenate([t[name] for t in traces], axis=1) for name in traces[0]
    }


def words(key, block, size):
    """Hash the counters of a block: its number and the place in it."""
    counters = np.concatenate([np.full(size, block, np.uint32), np.arange(size, dtype=np.uint32)])
    return (
        np.asarray(threefry_2x32(jax.random.key_data(key), counters))
        .reshape(2, size)
        .astype(np.uint64)
    )


def normals(key, block, size):
    """Turn 52 bits into a uniform number between -1 and 1, and that into a normal."""
    high, low = words(key, block, size)
    unit = ((high << np.uint64(32) | low) >> np.uint64(12)) * 2.0**-52
    return np.sqrt(2) * scipy.special.erfinv(2 * unit - 1)


def groups_of(case, family, params, key, step):
    """Draw the noise of a step.

    Three blocks of the key's counters, normals, labels and the batch.
    """
    mirrored = case.antithetic and case.draws == 2
    num, rank = 1 if mirrored else case.draws, max(case.ranks)
    drawn = normals(key, 3 * step, num * (DIM + rank + family.noise_size)).reshape(num, -1)
    quantiles = (np.bitwise_xor(*words(key, 3 * step + 1, num)) >> np.uint64(8)) * 2.0**-24
    ends = np.cumsum(scipy.special.softmax(np.asarray(params["logits"]) / family.temperature))
    groups = []
    for quantile, row in zip(quantiles, drawn, strict=True):
        label = np.searchsorted(ends[:-1], quantile, side="right")
        eps, z, zeta = np.split(row, [DIM, DIM + rank])
        one = Noise(label, eps, zeta[: case.core], z)
        mirror = Noise(label, -one.eps, -one.zeta, -one.z)
        groups.append([one, mirror] if mirrored else [one])
    return groups


def setting_of(case, config, family):
    num, root = len(case.ranks), np.sqrt(DIM)
    lazy = case.draws <= 2
    factor_rate = min(1.0, mfa.FACTOR_RATE / root) * TRUST * (np.sqrt(num) if lazy else 1.0)
    core_rate = min(1.0, mfa.CORE_RATE / root) * TRUST
    rates = {
        "logits": 1.0,
        "offsets": TRUST,
        "log_scale": TRUST,
        "core": core_rate,
        "factors": factor_rate,
    }
    return reference.Setting(
        scale=family.scale,
        core_mask=jnp.arange(case.core) < case.core - 1,
        rank_mask=jnp.arange(max(case.ranks)) < jnp.asarray(case.ranks)[:, None],
        temperature=config.alpha_temperature,
        dirichlet=config.alpha_dirichlet_prior or 1.0,
        entropy_weight=1 + config.entropy_bonus,
        lazy=lazy,
        max_ratio=config.clip_global_norm,
        typical_decay=optimizer.TYPICAL_NORM_DECAY,
        truncation=optimizer.TRUNCATION_STEPS,
        decays=(optimizer.ADAM_B1, optimizer.ADAM_B2),
        damping=mfa.DAMPING,
        rates=rates,
        baseline_decay=loop.BASELINE_DECAY,
    )


def schedule(step):
    """Return learning rate and elapsed share of the decay: warm-up, then a cosine."""
    elapsed = np.clip((step - DECAY_START) / (END - DECAY_START), 0, 1)
    least = FINAL_RATE
    return LR * min(1, (step + 1) / WARMUP) * (
        least + (1 - least) * (1 + np.cos(np.pi * elapsed)) / 2
    ), elapsed


def definition(case):
    """Run the same steps by the dense definition, one chain at a time."""
    config, family, problem, params = make(case)
    setting, (inputs, outputs) = setting_of(case, config, family), problem.data.examples
    center, results = problem.posterior.center, []

    @quick_jit
    def step(chain, rows, groups, rate, elapsed):
        def log_density(v):
            return -NBETA * loss(center + v, (inputs[rows], outputs[rows])) - 0.5 * GAMMA * jnp.sum(
                v**2
            )

        return reference.step(setting, chain, log_density, groups, rate, elapsed)

    start = quick_jit(reference.start)
    for index, key in enumerate(jax.random.split(jax.random.key(3), case.chains)):
        own = {name: np.asarray(leaf)[index] for name, leaf in params._asdict().items()}
        chain, traces = start(own), []
        for number in range(CHUNKS * LENGTH):
            rows = np.bitwise_xor(*words(key, 3 * number + 2, BATCH)) % NUM_DATA
            rate, elapsed = schedule(number)
            groups = groups_of(case, family, chain.params, key, number)
            chain, trace = step(chain, rows.astype(np.int32), groups, rate, elapsed)
            traces.append({**trace, "lr": rate})
        results.append(
            (chain.params, {name: np.stack([t[name] for t in traces]) for name in traces[0]})
        )
    return jax.tree_util.tree_map(lambda *leaves: np.stack(leaves), *results)


@pytest.mark.parametrize("name", also_as_users_compile(CASES, "mixture_pair"))
def test_steps_are_the_dense_definition(name, x64):
    case = CASES[name]
    (params, traces), (expected, defined) = implementation(case), definition(case)
    for leaf, want in expected.items():
        np.testing.assert_allclose(params[leaf], want, rtol=1e-10, atol=1e-11, err_msg=leaf)
    for trace, want in defined.items():
        np.testing.assert_allclose(traces[trace], want, rtol=1e-10, atol=1e-11, err_msg=trace)
