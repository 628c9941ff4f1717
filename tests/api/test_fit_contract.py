"""`fit` and `run_vi` as a framework calls them.

Flat vectors, OmegaConf, NumPy data, vmap over keys.
"""

import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64, quick_jit
from omegaconf import OmegaConf

import fastvi
from fastvi._errors import DataError
from fastvi.target.objective import make_flat_objective

COUNT, DIM, BATCH, STEPS = 200, 6, 50, 60
BETA, GAMMA = 1 / math.log(COUNT), 2.0
TRACES = {"elbo", "elbo_like", "logq", "radius2", "resp_entropy", "grad_norm", "cumulative_fge"}

rng = np.random.default_rng(0)
X = rng.normal(size=(COUNT, DIM)) * np.logspace(
    -0.5, 0.5, DIM
)  # float64, as a framework may hand over
W = rng.normal(size=DIM)
Y = (X @ W + 0.1 * rng.normal(size=COUNT))[:, None]
W = np.linalg.solve(X.T @ X, X.T @ Y)[:, 0]
CENTER = jnp.asarray(W, jnp.float32)
HESSIAN = X.T @ X / COUNT
LLC = 0.5 * np.trace(
    COUNT * BETA * HESSIAN @ np.linalg.inv(COUNT * BETA * HESSIAN + GAMMA * np.eye(DIM))
)


def loss(w, batch):
    inputs, targets = batch
    return 0.5 * jnp.mean((inputs @ w - targets[:, 0]) ** 2)


OBJECTIVE = make_flat_objective(loss)


def loss_full(w):
    return loss(w, (jnp.asarray(X, w.dtype), jnp.asarray(Y, w.dtype)))


def config(**entries):
    given = {"algo": "mfa", "M": 2, "r": 2, "steps": STEPS, "batch_size": BATCH, "lr": 0.01}
    return OmegaConf.create(given | entries)


ONE = {"M": 1, "r": 0}  # where the law knows nothing of mixtures


def whitener(diagonal):
    root = jnp.asarray(diagonal, jnp.float32)
    identity = types.SimpleNamespace(A_sqrt=root, A_inv_sqrt=1 / root)
    identity.to_tilde = lambda v: v * root
    identity.from_tilde = lambda v: v / root
    return identity


def run(rng_key=None, **changes):
    arguments = {
        "rng_key": jax.random.key(0) if rng_key is None else rng_key,
        "loss_full_flat": loss_full,
        "wstar_flat": CENTER,
        "objective": OBJECTIVE,
        "data": (X, Y),
        "n_data": COUNT,
        "beta": BETA,
        "gamma": GAMMA,
        "vi_cfg": config(),
        "whitener": whitener(1.0),
    }
    return fastvi.fit(**(arguments | changes))


@pytest.fixture(scope="module")
def result():
    return run()


DOUBLE = {"wstar_flat": np.asarray(W), "vi_cfg": config(dtype="float64")}


@pytest.fixture(scope="module")
def double():
    with enable_x64(True):
        return run(**DOUBLE)


def assert_within_errors(one, other):
    """Sampled numbers of two programs agree no closer: their roundings differ, by processor too."""
    llc, sem = zip(
        *((float(out["lambda_hat"]), float(out["extras"]["llc_sem"])) for out in (one, other)),
        strict=True,
    )
    assert abs(llc[0] - llc[1]) < 4 * math.hypot(*sem)


def assert_first_step_is_the_same(one, other, tolerance):
    """Until the parameters move, a fit is algebra on the same noise."""
    for name, trace in one.items():
        np.testing.assert_allclose(
            trace[0], other[name][0], rtol=tolerance, atol=tolerance, err_msg=name
        )


# One plain run.


def test_shapes_and_counts(result):
    assert result["traces"].keys() >= TRACES
    for name, trace in result["traces"].items():
        assert trace.shape == (STEPS,), name
        assert jnp.all(jnp.isfinite(trace)), name
    assert result["lambda_hat"].shape == ()
    assert result["traces"]["cumulative_fge"][-1] == pytest.approx(STEPS * BATCH / COUNT)
    work = json.loads(json.dumps(result["work"]))
    assert work["n_full_loss"] == 64
    assert work["n_minibatch_grads"] == STEPS
    assert work["sampler_flavour"] == "mfa"
    assert work["total_fge"] > work["fge_fit"] == pytest.approx(STEPS * BATCH / COUNT)
    assert set(result["timings"]) == {"adaptation", "sampling"}
    assert all(seconds > 0 for seconds in result["timings"].values())


def test_leaves_are_jax_arrays_or_numbers(result):
    for part in ("lambda_hat", "traces", "extras"):
        for leaf in jax.tree_util.tree_leaves(result[part]):
            assert isinstance(leaf, (jax.Array, int, float, bool))


def test_extras_agree_with_each_other(result):
    extras = result["extras"]
    assert extras.keys() >= {
        "Eq_Ln",
        "Ln_wstar",
        "Eq_Ln_mc",
        "Eq_Ln_cv",
        "llc_sem",
        "elbo",
        "pi",
        "D_sqrt",
        "result_code",
    }
    scaled = COUNT * BETA * (float(extras["Eq_Ln"]) - float(extras["Ln_wstar"]))
    assert scaled == pytest.approx(float(result["lambda_hat"]), abs=1e-4)
    assert float(extras["Ln_wstar"]) == pytest.approx(float(loss_full(CENTER)), rel=1e-6)
    assert extras["cv_info"]["Eq_Ln_cv"] == extras["Eq_Ln"] == extras["Eq_Ln_cv"]
    assert extras["cv_info"]["Eq_Ln_mc"] == extras["Eq_Ln_mc"]
    assert extras["cv_info"]["variance_reduction"] > 1
    assert extras["result_code"] == 0
    assert extras["pi"].shape == (2,)
    assert float(jnp.sum(extras["pi"])) == pytest.approx(1, abs=1e-5)
    assert extras["D_sqrt"].shape == (DIM,)
    assert jnp.all(extras["D_sqrt"] > 0)


def test_value(result):
    assert float(result["lambda_hat"]) == pytest.approx(LLC, rel=0.02)


def test_minibatches_agree_with_the_full_batch(result):
    """Batches of 50 and of all 200 examples.

    One E_q[L_n], and an unbiased log density along the way.
    """
    full = run(vi_cfg=config(batch_size=COUNT))
    assert full["traces"]["cumulative_fge"][-1] == STEPS
    excess = [float(out["extras"]["Eq_Ln"] - out["extras"]["Ln_wstar"]) for out in (result, full)]
    error = sum(float(out["extras"]["llc_sem"]) for out in (result, full)) / (COUNT * BETA)
    assert excess[0] == pytest.approx(excess[1], abs=4 * error + 0.02 * excess[1])
    late = [np.asarray(out["traces"]["elbo_like"], float)[-40:] for out in (result, full)]
    error = math.hypot(*(values.std() / math.sqrt(values.size) for values in late))
    assert abs(late[0].mean() - late[1].mean()) < 4 * error
    assert (
        error < 0.5
    )  # a batch of 50 that counted for n / 50 batches would move the mean by three times the llc


def test_same_key_same_bits(result):
    """One program in one process."""
    again, other = run(), run(jax.random.key(1))
    for name, trace in result["traces"].items():
        assert jnp.array_equal(trace, again["traces"][name]), name
    assert again["lambda_hat"] == result["lambda_hat"]
    assert other["lambda_hat"] != result["lambda_hat"]
    assert not jnp.array_equal(other["traces"]["elbo"], result["traces"]["elbo"])


def test_a_seed_and_a_legacy_key_are_the_typed_key(result):
    for key in (0, jax.random.PRNGKey(0)):  # the same argument of the same program: the same bits
        assert run(key)["lambda_hat"] == result["lambda_hat"]


# Inside jit and vmap.


@pytest.fixture(scope="module")
def mapped():
    """The call of a framework: once plainly, then vmapped over keys; returns arrays only."""

    @quick_jit
    @jax.vmap
    def chains(key):
        out = run(key, **DOUBLE)
        return out["lambda_hat"], out["traces"], out["extras"]

    return chains


@pytest.mark.parametrize(
    "make_key",
    [
        pytest.param(jax.random.key, id="typed"),
        pytest.param(
            jax.random.PRNGKey, id="legacy", marks=pytest.mark.slow
        ),  # compiles the whole once more
    ],
)
@pytest.mark.usefixtures("x64")
def test_vmap_over_keys(mapped, double, make_key):
    keys = jnp.stack([make_key(0), *jax.random.split(make_key(7), 2)])
    llc, traces, extras = mapped(keys)
    assert llc.shape == (3,)
    assert traces["elbo"].shape == (3, STEPS)
    assert extras["Eq_Ln"].shape == (3,)
    for chain, key in enumerate(keys):
        of_chain = {name: trace[chain] for name, trace in traces.items()}
        assert_first_step_is_the_same(of_chain, run(key, **DOUBLE)["traces"], 1e-12)
    assert_within_errors(
        {"lambda_hat": llc[0], "extras": {"llc_sem": extras["llc_sem"][0]}}, double
    )
    assert len(set(np.asarray(llc).tolist())) == 3
    np.testing.assert_allclose(llc, LLC, rtol=0.03)

    def draw(q, key):
        return q.sample_and_log_prob(key, (4,))

    draws, log_q = quick_jit(jax.vmap(draw))(extras["q"], keys)
    first = jax.tree_util.tree_map(lambda leaf: leaf[0], extras["q"])
    alone, log_q_alone = quick_jit(draw)(first, keys[0])
    assert draws.shape == (3, 4, DIM)
    np.testing.assert_allclose(draws[0], alone, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(log_q[0], log_q_alone, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_jit_of_fit_is_fit(result):
    jitted = jax.jit(run)(jax.random.key(0))
    assert_within_errors(jitted, result)
    assert jitted["work"]["sampler_flavour"] == "mfa"
    assert jitted["timings"] == {"adaptation": 0.0, "sampling": 0.0}
    fge = "cumulative_fge"
    np.testing.assert_allclose(jitted["traces"][fge], result["traces"][fge], rtol=1e-6)


def test_beta_may_be_an_array(result):
    """The same argument of the same program: the same bits."""
    assert (
        run(beta=jnp.asarray(BETA), gamma=np.float64(GAMMA))["lambda_hat"] == result["lambda_hat"]
    )


# The geometry from outside.


def test_whitener_of_vectors():
    """Only the shape of A_sqrt counts: a common factor changes nothing."""
    root, accurate = np.diag(HESSIAN) ** 0.5, config(samples_per_step=8, steps=300, **ONE)
    first, second = (
        run(whitener=whitener(factor * root), vi_cfg=accurate) for factor in (1.0, 8.0)
    )
    assert float(first["lambda_hat"]) == pytest.approx(LLC, rel=0.02)
    assert_first_step_is_the_same(first["traces"], second["traces"], 1e-4)  # in float32
    assert_within_errors(first, second)


def test_loss_full_flat_is_used():
    """Ln_wstar is read off the loss that was given: up to a constant that of the objective."""
    shifted = run(loss_full_flat=lambda w: loss_full(w) + 5)
    assert float(shifted["extras"]["Ln_wstar"]) == pytest.approx(
        float(loss_full(CENTER)) + 5, rel=1e-6
    )
    assert float(shifted["lambda_hat"]) == pytest.approx(LLC, rel=0.1)


def test_loss_full_flat_of_another_loss_is_refused():
    with pytest.raises(DataError, match="loss_full_flat is another loss than the objective"):
        run(loss_full_flat=lambda w: 2 * loss_full(w) + 5)


@pytest.mark.parametrize("factor", [3.0, -1.0, 0.0])
def test_gradient_of_another_loss_is_refused(factor):
    own = make_flat_objective(loss, lambda w, batch: factor * jax.grad(loss)(w, batch))
    with pytest.raises(DataError, match="gradient of objective disagrees with the loss"):
        run(objective=own)


@pytest.mark.parametrize("mode", ["rmsprop", "adam", "hvp_diag"])
def test_whitening_modes(mode):
    """Axis-aligned least squares of condition 1e4, rows of X one-hot: the Hessian is diagonal."""
    dim, gamma = 8, 0.1
    roots = np.logspace(-1, 1, dim) * dim**0.5
    inputs = np.tile(np.diag(roots), (25, 1))
    noise = np.random.default_rng(1).normal(size=(25, dim))
    targets = (noise - noise.mean(axis=0)).reshape(-1, 1)
    curvatures = np.diag(inputs.T @ inputs) / COUNT
    llc = 0.5 * np.sum(COUNT * BETA * curvatures / (COUNT * BETA * curvatures + gamma))
    out = run(
        data=(inputs, targets),
        wstar_flat=jnp.zeros(dim),
        gamma=gamma,
        loss_full_flat=None,
        whitener=None,
        vi_cfg=config(whitening_mode=mode, steps=300, samples_per_step=8, **ONE),
    )
    assert float(out["lambda_hat"]) == pytest.approx(llc, rel=0.02)


# Options.


@pytest.mark.usefixtures("x64")
def test_float64(double):
    assert double["lambda_hat"].dtype == double["traces"]["elbo"].dtype == jnp.float64
    scaled = COUNT * BETA * (double["extras"]["Eq_Ln"] - double["extras"]["Ln_wstar"])
    assert float(scaled) == pytest.approx(float(double["lambda_hat"]), rel=1e-10)
    assert float(double["lambda_hat"]) == pytest.approx(LLC, rel=0.02)


def test_a_loss_that_knows_float64_alone_is_fitted_in_float32():
    """With x64 on, an array that the loss closes over is float64, and so is the loss."""
    with enable_x64(True):
        one = jnp.asarray(1.0)
        assert one.dtype == jnp.float64
        objective = make_flat_objective(lambda w, batch: one * loss(w, batch))
        out = run(objective=objective, loss_full_flat=None, vi_cfg=config(steps=5, **ONE))
        assert out["traces"]["elbo"].dtype == jnp.float32
        assert float(out["lambda_hat"]) == pytest.approx(LLC, rel=0.05)


def test_a_mean_for_each_component_and_ranks():
    out = run(vi_cfg=config(means="component", M=3, r_per_component=[2, 1, 0]))
    assert float(out["lambda_hat"]) == pytest.approx(LLC, rel=0.03)
    assert out["extras"]["pi"].shape == (3,)


@pytest.mark.usefixtures("x64")
def test_equal_ranks_are_the_rank(double):
    ranks = run(**DOUBLE | {"vi_cfg": config(r=4, r_per_component=[2, 2], dtype="float64")})
    assert_first_step_is_the_same(ranks["traces"], double["traces"], 1e-12)
    assert_within_errors(ranks, double)


# Several chains.


def test_run_vi():
    chains = 3
    posterior = types.SimpleNamespace(flat0=CENTER)
    out = fastvi.run_vi(
        jax.random.PRNGKey(3),
        posterior,
        (X, Y),
        config(),
        chains,
        loss,
        None,
        loss_full,
        beta=BETA,
        gamma=GAMMA,
    )
    assert isinstance(out, fastvi.SamplerRunResult)
    assert out._fields == ("traces", "timings", "work")
    repeated = {"llc", "Eq_Ln_mc", "Eq_Ln_cv", "variance_reduction"}
    assert out.traces.keys() >= TRACES | repeated | {
        "Ln",
        "energy",
        "acceptance_rate",
        "is_divergent",
    }
    for name, trace in out.traces.items():
        assert trace.shape == (chains, STEPS), name
    for name in repeated:
        assert jnp.all(out.traces[name] == out.traces[name][:, :1]), name
    assert jnp.all(jnp.isnan(out.traces["Ln"]))
    assert jnp.all(out.traces["acceptance_rate"] == 1)
    assert jnp.array_equal(out.traces["energy"], out.traces["elbo"])
    assert not jnp.any(out.traces["is_divergent"])
    llc = np.asarray(out.traces["llc"][:, 0])
    np.testing.assert_allclose(llc, LLC, rtol=0.03)
    assert len(set(llc.tolist())) == chains
    work = json.loads(json.dumps(out.work))
    assert work["lambda_hat_mean"] == pytest.approx(llc.mean(), rel=1e-5)
    assert work["lambda_hat_std"] == pytest.approx(llc.std(), rel=1e-3)
    assert work["n_minibatch_grads"] == chains * STEPS
    assert work["fge_fit"] == pytest.approx(chains * STEPS * BATCH / COUNT)
    assert work["n_data"] == COUNT
    assert work["beta"] == pytest.approx(BETA)
    assert out.timings.keys() == {"adaptation", "sampling", "total"}


def test_a_chain_that_is_lost_takes_no_steps_from_the_others():
    """A number of steps is fixed, whatever becomes of a chain; the cliff is 3.2 sigma away."""

    def ending(w, batch):
        return 0.5 * jnp.sum(w**2) + jnp.where(w[0] > jnp.mean(batch), jnp.nan, 0.0)

    def run(cliff):
        return fastvi.run_vi(
            0,
            jnp.zeros(2),
            jnp.full((64, 1), cliff),
            {"steps": 600, "batch_size": 64, "M": 1, "r": 1},
            3,
            ending,
            None,
            lambda w: 0.5 * jnp.sum(w**2),
            beta=1 / math.log(64),
            gamma=1.0,
        )

    traces = run(0.79).traces
    lost = ~np.isfinite(traces["elbo"][:, -1])
    assert 0 < lost.sum() < 3
    assert traces["elbo"].shape == (3, 600)
    whole = run(1e6).traces
    np.testing.assert_allclose(traces["llc"][~lost, -1], whole["llc"][~lost, -1], rtol=0.02)
