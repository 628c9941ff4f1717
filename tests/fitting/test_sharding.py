"""Two host devices fit what one fits.

In a process of their own, since the count is fixed at the start.
"""

import json
import subprocess
import sys

import numpy as np

from tests.support.host_devices import environment_with

PROGRAM = """
import json
import jax, jax.numpy as jnp, numpy as np
from fastvi import estimate_llc, make_flat_objective
from fastvi._modes import in_own_modes
from fastvi.fitting import run as driver
from fastvi.fitting import sharding
from fastvi.target.data import hold

rng = np.random.default_rng(0)
inputs = rng.normal(size=(501, 5))
outputs = inputs @ np.arange(5.0) + rng.normal(size=501)
data = (jnp.asarray(inputs), jnp.asarray(outputs))
loss = lambda w, batch: 0.5 * jnp.mean((batch[0] @ w - batch[1]) ** 2)
center = jnp.asarray(np.linalg.lstsq(inputs, outputs)[0])
states = []
original = driver._run_chunks
def spy(programs, problem, schedule, course, *rest):
    course = original(programs, problem, schedule, course, *rest)
    states.append(course.state)
    return course
driver._run_chunks = spy
options = dict(key=0, num_chains=4, M=1, r=0, curvature_rank=0, dtype="float64")
options |= {"steps": 60, "progress": False, "throw": False, "method": "variational"}
at = center + 0.1
objective, held = make_flat_objective(loss), hold(data, max_batch=50)
mean = jax.jit(lambda w: sharding.data_parallel_mean(objective.value_and_grad, held, (w,)))
unasked = estimate_llc(loss, center, data, **options)
with jax.set_mesh(jax.make_mesh((jax.device_count(),), ("chains",))):
    result = estimate_llc(loss, center, data, **options)
    both = in_own_modes(mean)(at)
print(json.dumps({
    "devices": jax.device_count(),
    "unasked": len(states[0].baseline.sharding.device_set),
    "spread": len(states[1].baseline.sharding.device_set),
    "llc": result.llc_per_chain.tolist(),
    "sem": result.llc_sem_per_chain.tolist(),
    "first elbo": np.asarray(result.traces["elbo"])[:, 0].tolist(),
    "parallel": float(both[0]),
    "gradient": np.asarray(both[1]).tolist(),
    "exact gradient": np.mean((inputs @ at - outputs)[:, None] * inputs, axis=0).tolist(),
    "serial": float(held.mean(lambda batch: objective.loss(at, batch))),
    "exact": float(np.mean((np.float64(inputs) @ np.float64(at) - np.float64(outputs)) ** 2) / 2),
}))
"""


def run(devices):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment_with(devices, JAX_ENABLE_X64="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_chains_on_two_devices_are_those_of_one():
    one, two = run(1), run(2)
    assert (one["devices"], one["spread"]) == (1, 1)
    # without a mesh a second device is left alone
    assert (two["devices"], two["unasked"], two["spread"]) == (2, 1, 2)
    # before a chain moves, its step is algebra; then two programs agree within their errors, and no
    # closer
    np.testing.assert_allclose(two["first elbo"], one["first elbo"], rtol=1e-12)
    assert np.all(
        np.abs(np.subtract(two["llc"], one["llc"])) < 4 * np.hypot(one["sem"], two["sem"])
    )
    for loss in (one["parallel"], two["parallel"], one["serial"]):
        np.testing.assert_allclose(loss, one["exact"], rtol=1e-12)
    for found in (one, two):
        np.testing.assert_allclose(found["gradient"], found["exact gradient"], rtol=1e-12)
