"""Walkers divided over devices are those of one device.

In a process of its own, since the number of devices is fixed at the start.
"""

import pytest

from tests.support.host_devices import say_in_double_precision


@pytest.fixture(scope="module")
def found():
    return say_in_double_precision("tests.support.meshes", 8)


@pytest.mark.parametrize("steps", ["blocks", "all data", "minibatches", "anchored"])
def test_states_do_not_depend_on_the_devices(found, steps):
    for shape, one in found[steps].items():
        rows, columns = map(int, shape.split("x"))
        assert one["devices"] == rows * columns
        # twenty steps: nothing but the order of sums differs
        assert one["off"] < 1e-10, shape


def test_devices_divide_the_work(found):
    alone, divided = (found["all data"][shape]["costs"] for shape in ("1x1", "2x4"))
    # all but the walkers' own arithmetic is of the loss, and three examples are left over
    assert divided["flops"] < 0.2 * alone["flops"]
    # loss and gradient of a step are summed over the data together, once
    sums = {shape: one["costs"]["sums"] for shape, one in found["blocks"].items()}
    assert sums == {"1x1": 0, "8x1": 0, "4x2": 1}


def test_the_estimate_does_not_depend_on_the_devices(found):
    alone, divided, error = found["llc"]
    assert abs(divided - alone) < 1e-6 * error


def test_walkers_that_do_not_divide_are_refused(found):
    assert "multiple of the 4 devices" in found["uneven"]
    assert "Pass 8, or set a mesh of 2" in found["uneven"]


def test_any_mesh_says_which_devices(found):
    both, one_axis, one_device = found["layouts"]
    assert both == {"walkers": 4, "data": 2}
    assert one_axis == {"walkers": 8, "data": 1}
    assert one_device is None
