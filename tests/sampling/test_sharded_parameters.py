"""Walks on parameters that come divided over devices are those of flat parameters on one.

In processes of their own, since the number of devices is fixed at the start.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fastvi._vectors import Leaves, scale_rows, shape_of, sum_entries, sum_rows
from fastvi.kernels.noise import normal, normal_stretch, streams
from fastvi.kernels.noise.threefry import PAGE
from fastvi.sampling.from_localizer import memory
from tests.support.host_devices import say_in_double_precision

STATE = 3 * 4  # position, momentum and gradient of each of four walkers


def run(which):
    return say_in_double_precision("tests.support.divided", 4, which)


@pytest.fixture(scope="module")
def found():
    return run("one")


def test_states_do_not_depend_on_how_parameters_lie(found):
    for name, one in found["steps"].items():
        assert one["arrays"] == 3, name
        assert one["devices"] == (2 if name in ("2 by rows", "explicit") else 4)
        # twenty steps: nothing but the order of sums differs
        assert one["off"] < 1e-10, name


def test_no_device_gathers_an_array_of_the_model(found):
    for name, one in found["steps"].items():
        assert one["gathered"] < found["largest"] / 4, name


def test_devices_divide_the_state(found):
    steps = found["steps"]
    for name in ("4 by columns", "explicit"):
        assert steps[name]["state"] == pytest.approx(steps[name]["share"] * STATE, rel=0.05)
    # and walkers beside
    both = steps["2 of walkers, 2 by columns"]
    assert both["state"] == pytest.approx(both["share"] * STATE / 2, rel=0.05)


def test_the_estimate_of_divided_parameters(found):
    llc, error = found["llc"]
    assert abs(llc - found["exact"]) < 4 * error
    assert error < 0.1 * llc
    assert 0 < found["work"] <= 2e4


def test_what_needs_whole_parameters_is_told(found):
    assert not found["holds walkers"]
    assert "params are divided over several" in found["resume"]


@pytest.mark.slow
def test_estimates_are_those_of_flat_parameters(found):
    others = run("others")
    flat, error = others.pop("llc")
    assert abs(found["llc"][0] - flat) < 1e-6 * error
    llc, error, is_divided = others.pop("by default")
    assert abs(llc - found["exact"]) < 4 * error
    assert not is_divided  # the default gathers, as it may make a fit
    for name, ((one, error, _), (other, _, is_divided)) in others.items():
        assert is_divided, name
        assert abs(one - other) < 1e-6 * error, name


def test_memory_is_planned_by_the_part_of_a_device(found):
    """Eight walkers of a million parameters, in quarters: 24 numbers of theirs and 15 beside."""
    planned = memory.walk_bytes(10**6, 8, 4) / 4
    assert planned == 39e6
    at_limit, below = found["memory"]
    assert at_limit is None
    assert "takes 0.0 GiB on a device" in below


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_stretches_of_noise_are_those_of_one_vector(dtype, x64):
    key, sizes = jax.random.key(5), [(3, 4), (), (2, 3, 2)]
    whole = np.asarray(normal(key, (25,), dtype, block=7))
    places = streams.stretches(int(np.prod(size)) for size in sizes)
    assert places == [(0, 0), (0, 12), (0, 13)]
    drawn = [
        normal_stretch(key, size, dtype, block=7, page=page, start=start)
        for size, (page, start) in zip(sizes, places, strict=True)
    ]
    assert [one.shape for one in drawn] == sizes
    joined = np.concatenate([np.ravel(one) for one in drawn])
    np.testing.assert_allclose(joined, whole, rtol=1e-6 if dtype == jnp.float32 else 1e-14)


def test_stretches_beyond_a_page_are_of_other_keys():
    assert streams.stretches([PAGE - 10, 20, 5]) == [(0, 0), (1, 0), (1, 20)]
    key = jax.random.key(5)
    first, second = (normal_stretch(key, (20_000,), block=7, page=page, start=0) for page in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(20_000)
    assert abs(np.mean(second)) < 4 / np.sqrt(20_000)


def test_arithmetic_of_arrays_is_that_of_the_vector():
    rng = np.random.default_rng(0)
    shapes = [(2, 3), (4,), ()]

    def split(rows):
        parts = np.split(rows, [6, 10], axis=1)
        pairs = zip(parts, shapes, strict=True)
        return Leaves(tuple(jnp.asarray(part.reshape(-1, *shape)) for part, shape in pairs))

    def joined(vectors):
        return np.concatenate([np.reshape(one, (3, -1)) for one in vectors.arrays], axis=1)

    x, y = rng.normal(size=(2, 3, 11)).astype(np.float32)
    a, b, factors = split(x), split(y), jnp.arange(1.0, 4.0)
    assert shape_of(a) == (3, 11)
    assert a.size == 33
    found, expected = 1 + a * b - abs(b) / 2 + (-a) ** 2, 1 + x * y - abs(y) / 2 + x**2
    np.testing.assert_allclose(joined(found), expected, rtol=1e-4)
    np.testing.assert_allclose(joined(np.float32(2) * a + 1 / b), 2 * x + 1 / y, rtol=1e-4)
    scaled = np.arange(1, 4)[:, None] * x
    np.testing.assert_allclose(joined(scale_rows(factors, a)), scaled, rtol=1e-6)
    np.testing.assert_allclose(sum_rows(a * b), np.sum(x * y, axis=1), rtol=1e-4)
    np.testing.assert_allclose(a @ b, np.sum(x * y), rtol=1e-4)
    np.testing.assert_allclose(sum_entries(a), np.sum(x), rtol=1e-4)
