import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import enable_x64, quick_jit
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvi._errors import DataError
from fastvi.target.hessian import SecondDerivative, find_step, hvp_operator, second_derivative
from fastvi.target.inputs import check_data
from fastvi.target.objective import call_full_loss, make_flat_objective, value_and_grad
from fastvi.target.ravel import ravel_loss
from fastvi.target.signature import check_loss

EXAMPLES = 12
RNG = np.random.default_rng(0)
DATA = (RNG.normal(size=(EXAMPLES, 3)), RNG.normal(size=(EXAMPLES, 2)))


def dict_model():
    params = {"w": np.ones((3, 4)), "inner": [np.zeros(4), (np.full((4, 2), 0.5),)]}

    def predict(params, x):
        hidden = jnp.tanh(x @ params["w"] + params["inner"][0])
        return hidden @ params["inner"][1][0]

    return params, predict


def haiku_model():
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 2], activation=jnp.tanh)(x)))
    return net.init(jax.random.key(0), DATA[0]), net.apply


def equinox_model():
    return eqx.nn.MLP(
        3, 2, 4, 1, activation=jnp.tanh, key=jax.random.key(0)
    ), lambda net, x: jax.vmap(net)(x)


MODELS = {"dict": dict_model, "haiku": haiku_model, "equinox": equinox_model}


def squared_error(predict):
    def loss(params, batch):
        x, y = batch
        return jnp.mean(jnp.sum((predict(params, x) - y) ** 2, -1))

    return loss


def numerical_gradient(function, w, step=1e-5):
    return np.array(
        [(function(w + e) - function(w - e)) / (2 * step) for e in step * np.eye(w.size)]
    )


_CACHE = {}


def built(name):
    """One objective and one compiled gradient for each kind of model."""
    if name not in _CACHE:
        params, predict = MODELS[name]()
        loss = squared_error(predict)
        objective, w = ravel_loss(loss, params, jnp.float64)
        both = jax.jit(
            lambda w, b: (
                objective.grad(w, b),
                objective.value_and_grad(w, b),
                objective.loss(w, b),
            )
        )
        _CACHE[name] = objective, w, both, jax.jit(objective.loss)
    return _CACHE[name]


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**31 - 1), scale=st.floats(0.1, 2.0))
def test_gradient_is_the_loss_s_slope(name, seed, scale):
    with enable_x64(True):
        objective, w, both, loss = built(name)
        rng = np.random.default_rng(seed)
        index = rng.integers(0, EXAMPLES, size=5)
        batch = (jnp.asarray(DATA[0][index]), jnp.asarray(DATA[1][index]))
        w = jnp.asarray(rng.normal(size=w.size) * scale)
        grad, (value, grad_again), value_again = both(w, batch)
        expected = numerical_gradient(lambda point: float(loss(point, batch)), np.asarray(w))
    np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(grad_again, grad, rtol=1e-14)
    np.testing.assert_allclose(value, value_again, rtol=1e-14)


@pytest.mark.parametrize("name", MODELS)
def test_flat_loss_is_the_tree_s(name, x64):
    params, predict = MODELS[name]()
    objective, w = ravel_loss(squared_error(predict), params, jnp.float64)
    data = tuple(map(jnp.asarray, DATA))
    np.testing.assert_allclose(
        objective.loss(w, data), squared_error(predict)(params, data), rtol=1e-6
    )
    arrays = [
        leaf
        for leaf in jax.tree_util.tree_leaves(params)
        if eqx.is_array_like(leaf) and np.ndim(leaf)
    ]
    assert objective.structure.num_parameters == w.size == sum(leaf.size for leaf in arrays)
    np.testing.assert_array_equal(w, np.concatenate([np.ravel(leaf) for leaf in arrays]))


def test_a_given_gradient_is_used(x64):
    objective = make_flat_objective(lambda w, b: jnp.sum(w**2), lambda w, b: 7 * w)
    np.testing.assert_array_equal(objective.grad(jnp.ones(2), None), [7, 7])
    value, grad = objective.value_and_grad(jnp.ones(2), None)
    assert value == 2
    np.testing.assert_array_equal(grad, [7, 7])
    plain = make_flat_objective(lambda w, b: jnp.sum(w**2))
    np.testing.assert_array_equal(plain.grad(jnp.ones(2), None), [2, 2])
    np.testing.assert_array_equal(plain.value_and_grad(jnp.ones(2), None)[1], [2, 2])


class LossAndGradient:
    """An objective with the two methods that the contract asks for."""

    def loss(self, w, batch):
        return jnp.sum(w**2)

    def grad(self, w, batch):
        return 2 * w


def test_value_and_grad_is_optional():
    value, grad = value_and_grad(LossAndGradient(), jnp.full(2, 3.0), None)
    assert value == 18
    np.testing.assert_array_equal(grad, [6, 6])
    both = make_flat_objective(lambda w, b: jnp.sum(w**2))
    assert value_and_grad(both, jnp.full(2, 3.0), None)[0] == 18


class FullLoss:
    def __call__(self, w, data):
        return jnp.sum(w) + jnp.sum(data)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda w: jnp.sum(w), 2),
        (lambda w, data: jnp.sum(w) + jnp.sum(data), 5),
        (lambda w, data=np.ones(1): jnp.sum(w) + jnp.sum(data), 3),
        (functools.partial(lambda data, w: jnp.sum(w) + jnp.sum(data), np.ones(1)), 3),
        (functools.partial(lambda scale, w, data: scale * (jnp.sum(w) + jnp.sum(data)), 2), 10),
        (lambda w, *, data=np.ones(1): jnp.sum(w) + jnp.sum(data), 3),
        (FullLoss(), 5),
        (FullLoss().__call__, 5),
        (jax.jit(lambda w, data: jnp.sum(w) + jnp.sum(data)), 5),
        (lambda *args: sum(jnp.sum(a) for a in args), 2),
        (lambda *args: jnp.sum(args[0]) + jnp.sum(args[1]), 5),
        (lambda *args, **options: FullLoss()(*args, **options), 5),
    ],
)
def test_a_full_loss_may_take_the_data(function, expected):
    assert call_full_loss(function, jnp.ones(2), jnp.ones(3)) == expected


@pytest.mark.parametrize("function", [lambda: 0.0, lambda w, x, y: 0.0, 3.0])
def test_a_full_loss_of_another_form_is_refused(function):
    with pytest.raises(DataError, match=r"\(w\) -> loss or \(w, data\) -> loss"):
        call_full_loss(function, jnp.ones(2), jnp.ones(3))


class Settings(eqx.Module):
    weight: jax.Array
    rates: tuple


def test_floats_of_equinox_modules_are_settings():
    """Also within a dict, and below a field; beside the module they are refused."""
    module = Settings(jnp.ones(2), (0.5, {"eps": 1e-3}))
    objective, w = ravel_loss(lambda p, b: jnp.sum(p["m"].weight), {"m": module})
    assert w.size == 2
    assert objective.structure.unravel(w)["m"].rates == (0.5, {"eps": 1e-3})
    assert ravel_loss(lambda p, b: 0.0, module)[1].size == 2
    with pytest.raises(DataError, match=r"params\['rate'\] is the Python float"):
        ravel_loss(lambda p, b: 0.0, {"m": module, "rate": 0.5})


def test_unravel_inverts_ravel():
    params = {
        "half": jnp.asarray([[1.5, -2.25]], jnp.bfloat16),
        "nested": (
            np.arange(6, dtype=np.float32).reshape(2, 3),
            (jnp.asarray(7.0), [np.zeros((0, 2), np.float32)]),
        ),
        "act": jnp.tanh,
        "setting": (3, "same", True),
    }
    objective, w = ravel_loss(lambda p, b: jnp.sum(p["half"]), params)
    assert w.dtype == jnp.float32
    np.testing.assert_array_equal(w, [1.5, -2.25, 0, 1, 2, 3, 4, 5, 7])
    rebuilt = objective.structure.unravel(w)
    assert jax.tree_util.tree_structure(rebuilt) == jax.tree_util.tree_structure(params)
    for got, want in zip(
        jax.tree_util.tree_leaves(rebuilt), jax.tree_util.tree_leaves(params), strict=True
    ):
        if eqx.is_array_like(want) and hasattr(want, "dtype"):
            assert got.dtype == want.dtype
            np.testing.assert_array_equal(got, want)
        else:
            assert got is want
    moved = objective.structure.unravel(w + 1)
    np.testing.assert_array_equal(moved["nested"][0], params["nested"][0] + 1)
    assert objective.grad(w, None).dtype == jnp.float32


def test_float64_leaves_follow_the_flat_dtype(x64):
    objective, w = ravel_loss(lambda p, b: jnp.sum(p), np.ones(3))
    assert w.dtype == jnp.float32
    assert objective.structure.unravel(w).dtype == jnp.float32
    assert objective.structure.unravel(w.astype(jnp.float64)).dtype == jnp.float64


def test_objectives_compare_by_function_and_structure():
    def loss(params, batch):
        return jnp.sum(params["a"])

    first, _ = ravel_loss(loss, {"a": np.ones(3, np.float32), "f": jnp.tanh})
    same, _ = ravel_loss(loss, {"a": np.full(3, 5, np.float32), "f": jnp.tanh})
    assert first == same
    assert hash(first) == hash(same)
    others = [
        ravel_loss(lambda p, b: jnp.sum(p["a"]), {"a": np.ones(3, np.float32), "f": jnp.tanh})[0],
        ravel_loss(loss, {"a": np.ones(4, np.float32), "f": jnp.tanh})[0],
        ravel_loss(loss, {"a": np.ones(3, np.float16), "f": jnp.tanh})[0],
        ravel_loss(loss, {"a": np.ones(3, np.float32), "f": jnp.sin})[0],
        ravel_loss(loss, {"b": np.ones(3, np.float32), "f": jnp.tanh})[0],
    ]
    assert all(first != other for other in others)
    assert make_flat_objective(loss) == make_flat_objective(loss)
    assert hash(make_flat_objective(loss)) == hash(make_flat_objective(loss))
    assert make_flat_objective(loss) != make_flat_objective(loss, loss)


@jax.custom_vjp
def cube(x):
    return x**3


cube.defvjp(lambda x: (x**3, x), lambda x, g: (3 * x**2 * g,))


@jax.custom_vjp
def idiomatic_cube(x):
    return x**3


idiomatic_cube.defvjp(lambda x: (idiomatic_cube(x), x), lambda x, g: (3 * x**2 * g,))


def on_host(function, x):
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(
        lambda x: np.asarray(function(x), x.dtype), result, x, vmap_method="sequential"
    )


@jax.custom_vjp
def simulated_cube(x):
    return on_host(lambda x: x**3, x)


simulated_cube.defvjp(
    lambda x: (simulated_cube(x), x), lambda x, g: (on_host(lambda x: 3 * x**2, x) * g,)
)


def smooth(w, batch):
    return jnp.mean(jnp.sin(batch @ w) ** 2) + w[0] * w[1] ** 3


def with_custom_vjp(w, batch):
    return jnp.mean(jnp.sin(batch @ w) ** 2) + w[0] * cube(w[1])


def with_idiomatic_vjp(w, batch):
    return jnp.mean(jnp.sin(batch @ w) ** 2) + w[0] * idiomatic_cube(w[1])


def with_simulator(w, batch):
    return jnp.mean(jnp.sin(batch @ w) ** 2) + w[0] * simulated_cube(w[1])


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("loss", [smooth, with_custom_vjp, with_idiomatic_vjp])
def test_hvp_is_the_hessian_times_the_tangent(loss, jitted, x64):
    batch, w = jnp.asarray(DATA[0]), jnp.asarray([0.3, -0.7, 1.1])
    hessian = quick_jit(jax.hessian(smooth))(w, batch)

    def columns(w):
        return jax.vmap(hvp_operator(make_flat_objective(loss), w, batch))(jnp.eye(3))

    np.testing.assert_allclose(
        (jax.jit(columns) if jitted else columns)(w), hessian, rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-8), (jnp.float32, 1e-3)])
def test_hvp_without_a_second_derivative(dtype, tolerance, x64):
    """Differences of gradients, for coordinates of any size."""
    batch, w = jnp.asarray(DATA[0], dtype), jnp.asarray([0.3, -70.0, 1.1], dtype)
    exact = quick_jit(jax.hessian(smooth))(*(np.float64(leaf) for leaf in (w, batch)))
    hvp = hvp_operator(make_flat_objective(with_simulator), w, batch)
    found = jax.jit(jax.vmap(hvp))(jnp.eye(3, dtype=dtype))
    assert found.dtype == dtype
    np.testing.assert_allclose(found, exact, rtol=tolerance, atol=tolerance * 3 * 70**2)
    np.testing.assert_array_equal(hvp(jnp.zeros(3, dtype)), 0)


@pytest.mark.parametrize(
    ("loss", "way"),
    [
        (smooth, SecondDerivative.FORWARD),
        (with_idiomatic_vjp, SecondDerivative.REVERSE),
        (with_simulator, SecondDerivative.DIFFERENCES),
    ],
)
def test_the_way_to_a_second_derivative_is_said(loss, way):
    w = jnp.asarray([0.3, -0.7, 1.1])
    assert second_derivative(make_flat_objective(loss), w, jnp.asarray(DATA[0])) is way


@pytest.mark.parametrize("strength", [1.0, 1e3])
@pytest.mark.parametrize("inexact", [0.0, 1e-3])
def test_the_step_of_differences_fits_the_gradient(strength, inexact):
    """Parameters that act a thousand times as strongly, gradients right to three digits."""
    w = jnp.asarray([0.3, -0.7, 1.1]) / strength

    def gradient(w):
        turned = jnp.sin(1e5 * strength * w)  # what a solver leaves, another at each point
        return strength * (jnp.sin(strength * w) + inexact * turned)

    step = find_step(gradient, w)
    relative = step / jnp.sqrt(3.0)
    along = jnp.ones(3)
    product = (gradient(w + relative * along) - gradient(w - relative * along)) / (2 * relative)
    exact = strength**2 * jnp.cos(strength * w)
    error = jnp.linalg.norm(product - exact) / jnp.linalg.norm(exact)
    assert error < (0.05 if inexact else 0.01), (float(step), float(error))


def test_a_loss_that_does_not_curve_has_products_of_zero():
    hvp = hvp_operator(make_flat_objective(with_simulator), jnp.zeros(3), jnp.zeros((4, 3)))
    np.testing.assert_allclose(jax.vmap(hvp)(jnp.eye(3)), 0, atol=1e-2)


def test_hvp_keeps_other_type_errors():
    def loss(w, batch):
        raise TypeError("my own")

    with pytest.raises(TypeError, match="my own"):
        hvp_operator(make_flat_objective(loss), jnp.ones(2), None)


# Errors: the rule, what came, the likely fix.


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"a": np.arange(3)},
            r"params\['a'\] has dtype int.*only floating-point.*Cast it to float32",
        ),
        ({"a": [np.ones(2, bool)]}, r"params\['a'\]\[0\] has dtype bool"),
        ({"a": np.array([1.0, np.nan])}, r"params\['a'\] holds NaN or infinity.*diverge"),
        ({"a": np.array([np.inf])}, r"holds NaN or infinity"),
        ({"a": np.ones(2), "b": object()}, r"params\['b'\] is an object of type object"),
        ({"a": np.array(["x"])}, r"params\['a'\] has dtype <U1"),
        ({"a": 1, "f": jnp.tanh}, "holds no floating-point array"),
        (
            {"a": np.ones(2), "b": 0.5},
            r"params\['b'\] is the Python float 0.5.*jnp.asarray.*close over it",
        ),
        ([np.ones(2), (1j,)], r"params\[1\]\[0\] is the Python complex 1j"),
        ({"a": np.zeros((0, 2)), "b": np.zeros(0)}, "holds 2 empty arrays"),
        ({"a": np.full(2, 1e300)}, r"params\['a'\] holds numbers too large for float32"),
        (
            {"a": jnp.zeros(2, jnp.float8_e4m3fn)},
            r"params\['a'\] has dtype float8_e4m3fn, too coarse",
        ),
        ({}, "holds no floating-point array"),
        (None, "holds no floating-point array"),
    ],
)
def test_bad_parameters_are_refused(params, message):
    with pytest.raises(DataError, match=message):
        ravel_loss(lambda p, b: 0.0, params)


def test_object_arrays_are_refused_as_parameters():
    with pytest.raises(DataError, match=r"params\['a'\] has dtype object"):
        ravel_loss(lambda p, b: 0.0, {"a": np.array([1.0, None], object)})


@pytest.mark.parametrize("build", [lambda bad: ravel_loss(bad, np.ones(2)), make_flat_objective])
def test_a_loss_must_be_a_function(build):
    with pytest.raises(DataError, match=r"loss.* must be a function .*got float"):
        build(3.0)
    with pytest.raises(DataError, match="grad_loss_minibatch must be a function"):
        make_flat_objective(lambda w, b: 0.0, 3.0)


@pytest.mark.parametrize(
    ("data", "n_data", "message"),
    [
        ((), None, "data is empty"),
        ((np.ones(3), np.ones(4)), None, r"same leading axis.*data\[0\]: 3, data\[1\]: 4"),
        ((np.ones((0, 2)),), None, "no examples"),
        ({"x": np.ones(3), "y": 2.0}, None, r"data\['y'\] is a scalar"),
        ({"x": np.array([1.0, np.nan])}, None, r"data\['x'\] holds NaN or infinity"),
        (np.array(["a", "b"]), None, "data has dtype <U1.*Encode strings"),
        (np.array([1, None], object), None, "data has dtype object"),
        (np.ones(3), 4, "n_data=4 for 3 examples"),
    ],
)
def test_bad_data_is_refused(data, n_data, message):
    with pytest.raises(DataError, match=message):
        check_data(data, n_data)


def test_good_data_is_kept():
    data, count = check_data(
        {"x": np.ones((3, 2), np.float32), "y": np.arange(3), "m": np.array([True, False, True])}, 3
    )
    assert count == 3
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree_util.tree_leaves(data))
    np.testing.assert_array_equal(data["y"], [0, 1, 2])
    assert data["m"].dtype == bool
    assert jax.jit(lambda d: check_data(d)[0])(np.arange(2.0)).shape == (2,)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            lambda w, b: w,
            r"one floating-point scalar.*got float32\[3\] for 12 examples.*first axis",
        ),
        (lambda w, b: (b @ w, w), r"one shape, batch axis first.*auxiliary"),
        (lambda w, b: (jnp.sum(w), jnp.sum(b)), r"a pair of scalars, as of has_aux"),
        (lambda w, b: (b @ w, (b @ w).astype(complex)), "weights are numbers"),
        (lambda w, b: (b.T @ b @ w, w), "batch axis first"),
        (lambda w, b: (jnp.sum(w), b), "one floating-point scalar"),
        (lambda w, b: jnp.sum(w).astype(int), "one floating-point scalar"),
        (lambda w, b: None, "got nothing"),
    ],
)
def test_bad_losses_are_refused(loss, message):
    batch = jnp.asarray(DATA[0], jnp.float32)
    with pytest.raises(DataError, match=message):
        check_loss(make_flat_objective(loss), jnp.ones(3), batch)


def test_bad_gradients_are_refused():
    batch = jnp.asarray(DATA[0], jnp.float32)
    with pytest.raises(DataError, match=r"gradient of loss_fn must have shape \(3,\); got \(2,\)"):
        check_loss(
            make_flat_objective(lambda w, b: jnp.sum(w), lambda w, b: w[:2]), jnp.ones(3), batch
        )
    check_loss(make_flat_objective(lambda w, b: jnp.sum(w)), jnp.ones(3), batch)


def test_what_a_loss_computes_of_an_example_is_counted():
    """A dense layer of 7, its sum, and ten turns of a loop; nothing that weights alone make."""

    def loss(w, batch):
        hidden = batch @ jnp.tanh(w).reshape(3, 7)
        return jnp.mean(jnp.sum(jax.lax.scan(lambda h, _: (2 * h, None), hidden, None, 10)[0], -1))

    batch, floats = jnp.zeros((6, 3)), 7 + 10 * 7 + 1
    found = check_loss(make_flat_objective(loss), jnp.zeros(21), batch)
    assert found.bytes_per_example == floats * batch.dtype.itemsize
