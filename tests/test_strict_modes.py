"""Strict modes of jax leave the estimates as they are, and hold a person's own loss to them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi._compilation import BorrowedObjective
from fastvi._modes import in_own_modes, their_product_eps
from fastvi.families.moments import LinearMap
from fastvi.kernels.woodbury import xla
from fastvi.target.hessian import hvp_operator
from fastvi.target.objective import call_full_loss, make_flat_objective, value_and_grad

X = jax.device_put(np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32))
CENTER, KEY = jax.device_put(np.zeros(3, np.float32)), jax.random.key(0)
SMALL = {"steps": 20, "eval_samples": 8, "batch_size": 8, "progress": False, "num_chains": 1}
# of a fit that walkers follow, so that one without them has the same programs
SMALL |= {"samples_per_step": 2, "curvature_examples": len(X)}
FLOW = {"family": "flow", "flow": {"depth": 2, "hidden": [8]}}

MODES = {
    "none": lambda: jax.numpy_rank_promotion("allow"),
    "rank": lambda: jax.numpy_rank_promotion("raise"),
    "dtype": lambda: jax.numpy_dtype_promotion("strict"),
    "transfer": lambda: jax.transfer_guard("disallow"),
}


def loss(w, batch):
    return 0.5 * jnp.mean((batch[0] @ w) ** 2)


OBJECTIVE = make_flat_objective(loss)


def fitted():
    options = {"steps": 20, "eval_samples": 8, "batch_size": 8}
    result = fastvi.fit(
        rng_key=KEY,
        objective=OBJECTIVE,
        wstar_flat=CENTER,
        data=(X,),
        n_data=40,
        beta=0.3,
        gamma=1.0,
        vi_cfg=options,
    )
    return np.asarray(result["lambda_hat"])


RUNS = {
    "a mixture": lambda: fastvi.estimate_llc(loss, CENTER, (X,), method="variational", **SMALL).llc,
    "a flow": lambda: (
        fastvi.estimate_llc(loss, CENTER, (X,), method="variational", **FLOW, **SMALL).llc
    ),
    "walkers": lambda: (
        fastvi.estimate_llc(loss, CENTER, (X,), method="sample", budget=500 * len(X), **SMALL).llc
    ),
    "fit": fitted,
}


@pytest.mark.parametrize("run", RUNS)
def test_an_estimate_is_the_same_in_every_mode(run):
    """The programs are the same, so the bits are."""
    found = {}
    for name, mode in MODES.items():
        with mode():
            found[name] = float(RUNS[run]())
    assert np.isfinite(found["none"])
    assert set(found.values()) == {found["none"]}


def test_chains_of_a_sampler_are_read_in_every_mode():
    draws = np.random.default_rng(1).normal(size=(4, 50, 3))
    options = {"nbeta": 1.0, "localization": 0.0, "center": np.zeros(3), "init_loss": 0.0}
    for mode in MODES.values():
        with mode():
            found = fastvi.virial_llc(draws, draws, 0.5 * np.sum(draws**2, axis=-1), **options)
        assert abs(found.llc - 1.5) < 4 * found.llc_sem


@pytest.mark.parametrize(
    ("mode", "error", "careless"),
    [
        ("rank", ValueError, lambda w, batch: jnp.mean((batch[0] * w) ** 2)),
        (
            "dtype",
            ValueError,
            lambda w, batch: jnp.mean(batch[0] @ w * jnp.arange(batch[0].shape[0])),
        ),
    ],
)
def test_a_loss_is_held_to_the_mode_of_its_owner(mode, error, careless):
    with MODES[mode](), pytest.raises(error, match="promotion") as caught:
        fastvi.estimate_llc(careless, CENTER, (X,), **SMALL)
    assert not isinstance(caught.value, fastvi.DataError)
    assert jax.config.jax_numpy_rank_promotion == "allow"
    assert call_full_loss(lambda w: jnp.sum(w), CENTER, (X,)) == 0


@pytest.mark.parametrize("theirs", [None, "bfloat16"])
@pytest.mark.parametrize("start", ["fit", "localizer"])
def test_products_of_the_package_keep_all_digits(start, theirs, monkeypatch):
    """A GPU computes products in single precision with 11 bits, unless it is told."""
    seen = {"loss": set(), "map": set(), "density": set()}

    def noting(name, function):
        def call(*args, **options):
            seen[name].add(jax.config.jax_default_matmul_precision)
            return function(*args, **options)

        return call

    monkeypatch.setattr(LinearMap, "project", noting("map", LinearMap.project))
    monkeypatch.setattr(xla, "draw", noting("density", xla.draw))
    with jax.default_matmul_precision(theirs):
        fastvi.estimate_llc(
            # of its own, since programs of an equal loss would be found
            noting("loss", lambda w, batch: (0.7 if theirs else 0.6) * loss(w, batch)),
            CENTER,
            (X,),
            method="sample",
            sampler={"start": start},
            budget=500 * len(X),
            **{"progress": False, **(SMALL if start == "fit" else {})},
        )
    assert seen["loss"] == {theirs or "default"}
    # a walk from the localizer scales each coordinate, and has no products of its own
    assert seen["map"] == seen["density"] == ({"highest"} if start == "fit" else set())


def precisions(function, *arguments):
    """Return the precisions of all products that a function computes."""
    found = set()

    def look(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.add(str(equation.params["precision"]).split(".")[-1].rstrip(")"))
            jax.tree_util.tree_map(
                lambda value: look(getattr(value, "jaxpr", value)),
                [value for value in equation.params.values() if hasattr(value, "jaxpr")],
            )

    look(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


@jax.custom_vjp
def product(left, right):
    """Multiply, with a derivative of its own."""
    return left @ right


product.defvjp(
    lambda left, right: (left @ right, (left, right)),
    lambda kept, out: (out @ kept[1].T, kept[0].T @ out),
)


class Given:
    """A flat objective of somebody's own class."""

    def loss(self, w, batch):
        return jnp.mean(jnp.tanh(batch @ w.reshape(3, 2)) ** 2)

    def grad(self, w, batch):
        return jax.grad(self.loss)(w, batch)


def with_own_vjp(w, batch):
    return jnp.mean(jnp.tanh(product(batch, w.reshape(3, 2))) ** 2)


OBJECTIVES = {
    "a function": lambda: make_flat_objective(Given().loss),
    "a derivative of its own": lambda: make_flat_objective(with_own_vjp),
    "a class": Given,
}


@pytest.mark.parametrize(
    ("theirs", "expected"), [(None, "DEFAULT"), ("bfloat16", "DEFAULT"), ("highest", "HIGHEST")]
)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_loss_multiplies_as_its_owner_says_also_backwards(kind, theirs, expected):
    objective, w = OBJECTIVES[kind](), jnp.ones(6)
    borrowed = BorrowedObjective(objective)  # as programs hold it

    @in_own_modes
    def traced():
        return [
            precisions(lambda w, batch: value_and_grad(borrowed, w, batch), w, X),
            precisions(borrowed.loss, w, X),
            precisions(lambda w, batch: hvp_operator(borrowed, w, batch)(w), w, X),
            precisions(lambda w: w @ w, w),
        ]

    with jax.default_matmul_precision(theirs):
        *of_loss, own = traced()
    assert of_loss == [{expected}] * 3
    assert own == {"HIGHEST"}


@pytest.mark.slow  # op by op, a minute
def test_without_jit_the_estimate_is_the_same():
    options = {**SMALL, "method": "variational", "steps": 1, "eval_samples": 4, "curvature_rank": 0}
    compiled = fastvi.estimate_llc(loss, CENTER, (X,), **options)
    with jax.disable_jit():
        plain = fastvi.estimate_llc(loss, CENTER, (X,), **options)
    assert plain.llc == pytest.approx(compiled.llc, rel=1e-4)


@pytest.mark.parametrize(
    ("backend", "theirs", "eps"),
    [
        ("cpu", None, 0),
        ("gpu", None, 2**-10),
        ("gpu", "tensorfloat32", 2**-10),
        ("gpu", "bfloat16", 2**-7),
        ("tpu", None, 2**-7),
        ("gpu", "highest", 0),
        ("tpu", "float32", 0),
    ],
)
def test_the_digits_of_a_loss_are_those_its_owner_has_set(backend, theirs, eps, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with jax.default_matmul_precision(theirs):
        assert their_product_eps() == eps
        assert in_own_modes(their_product_eps)() == eps
