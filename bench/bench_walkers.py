"""What a walkers' step costs beside the gradients that it contains.

Eight walkers step on a tanh network, batch 256 of n = 20,000. The floor descends by the gradients
of eight walkers on blocks of their own: both are one scan with default compile options.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench.harness import bytes_accessed, compared, in_turn, peak_megabytes, record, score
from bench.problems import BATCH, layer_shapes, predict_by_layers, tanh_network
from bench.selection import sizes
from fastvi import LocalPosterior
from fastvi.families.moments import LinearMap
from fastvi.sampling.from_localizer.batches import DrawnReader
from fastvi.sampling.from_localizer.steps import RoundInputs, blank_state, minibatch_programs
from fastvi.sampling.gradients import PAIR, split_data
from fastvi.sampling.programs import blank_evaluation, sampler_programs
from fastvi.sampling.settings import SamplerSettings
from fastvi.sampling.tuning import first_step_size
from fastvi.sampling.walkers import Walkers
from fastvi.target.data import Problem, hold
from fastvi.target.fingerprint import fingerprint_loss
from fastvi.target.losses import take_examples
from fastvi.target.objective import value_and_grad
from fastvi.target.ravel import ravel_loss

STEPS, WALKERS = 192, 8
STEP_SIZE = 1e-6
# largest multiples of the gradients that a step should cost, on a CPU
ASKED = {1_000: 1.4, 10_000: 1.7, 100_000: 1.9}
ASKED_MORE = {"blocks": 0.0, "minibatches": 0.35, "anchored minibatches": 1.05}
BASIS_ROWS = {1_000: 56, 10_000: 80, 100_000: 80}
ROUNDS = {1_000: 15, 10_000: 8, 100_000: 3}
FLOOR = "gradients"


class Case:
    """The network, its data in blocks, and the coordinates of the walkers."""

    def __init__(self, size: int):
        self.size = size
        _, center, data = tanh_network(size)
        layers = [jnp.zeros(shape) for shape in layer_shapes(size)]
        self.num_data, self.dim = data[1].size, center.size
        posterior = LocalPosterior(center, jnp.float32(self.num_data), jnp.float32(1.0))
        self.problem = Problem(posterior, hold(data), BATCH)
        self.objective, _ = ravel_loss(
            lambda layers, batch: jnp.mean((predict_by_layers(layers, batch[0]) - batch[1]) ** 2),
            layers,
        )
        self.loss = fingerprint_loss(self.objective, self.problem)
        self.blocks = split_data(self.num_data, PAIR * self.num_data // BATCH)
        self.keys = jax.random.split(jax.random.key(1), WALKERS)
        self.width = jnp.full(self.dim, 1e-3, jnp.float32)
        self.position = jax.random.normal(jax.random.key(0), (WALKERS, self.dim), jnp.float32)

    def coordinates(self, rows: int) -> LinearMap:
        """Return coordinates with so many directions of their own."""
        basis = jax.random.normal(jax.random.key(2), (self.dim, rows), jnp.float32)
        basis = jnp.linalg.qr(basis)[0].T
        return LinearMap(jnp.zeros(self.dim), self.width, basis, -0.5 * jnp.eye(rows))


def gradients_scan(case: Case):
    """Descend by the bare gradients of every walker's block."""
    rows = jnp.asarray(split_data(case.num_data, case.num_data // BATCH).rows)
    examples = case.problem.data.examples
    center = case.problem.posterior.center

    @jax.jit
    def scan(w, examples, key):
        def body(w, key):
            blocks = jax.random.randint(key, (WALKERS,), 0, rows.shape[0])
            batches = take_examples(examples, rows[blocks])
            losses, slopes = jax.vmap(lambda w, b: value_and_grad(case.objective, w, b))(w, batches)
            return w - STEP_SIZE * slopes, losses

        return jax.lax.scan(body, w, jax.random.split(key, STEPS))

    arguments = center + case.width * case.position, examples, jax.random.key(3)
    compiled = scan.lower(*arguments).compile()
    return compiled, lambda: compiled(*arguments)


def blocks_scan(case: Case):
    """Run steps from a fit: on pairs of blocks, in the coordinates of a q with a core."""
    settings = SamplerSettings(bins=STEPS // 4, bin_length=4)
    programs = sampler_programs(case.objective, case.loss, case.problem, settings)
    linear_map = case.coordinates(BASIS_ROWS[case.size])
    zero = jnp.zeros(())
    anchor = programs.anchor(case.problem, linear_map, 0 * case.position[0], zero, case.blocks)
    walkers = Walkers(
        linear_map,
        case.position,
        case.position[::-1],
        jnp.zeros(WALKERS),
        first_step_size(case.dim, np.float32),
        case.keys,
        jnp.zeros(WALKERS),
    )
    here = blank_evaluation(walkers, programs.columns, is_noisy=True)
    first, start, stop = np.int32(0), np.int32(0), np.int32(STEPS)
    rest = zero, np.float32(5e-4), np.float32(2.0), first, start, stop
    arguments = case.problem, anchor, walkers, here, *rest
    compiled = programs.advance.lower(*arguments).compile()
    return compiled, lambda: compiled(*arguments)


def minibatches_scan(case: Case, *, is_anchored: bool = False):
    """Run steps from the localizer: on fresh minibatches, each coordinate with a scale."""
    source = DrawnReader(case.problem.data.examples, BATCH).first
    posterior = case.problem.posterior
    programs = minibatch_programs(case.objective, case.loss, posterior, source, STEPS)
    inputs = RoundInputs(
        posterior,
        case.width,
        source,
        programs.full_gradient(case.problem) if is_anchored else None,
        case.keys,
        jnp.asarray(1, jnp.int32),
    )
    sizes = np.float32(0.1), np.float32(2.0), np.int32(0), np.int32(0), np.int32(STEPS)
    state = blank_state(case.position.shape, case.position.dtype)
    state = state._replace(position=jnp.array(case.position))  # which is used up
    compiled = programs.advance.lower(inputs, state, *sizes).compile()
    held = [state]

    def call():  # the state is used up
        after, steps = compiled(inputs, held.pop(), *sizes)
        held.append(after)
        return steps

    return compiled, call


METHODS = {
    FLOOR: gradients_scan,
    "blocks": blocks_scan,
    "minibatches": minibatches_scan,
    "anchored minibatches": lambda case: minibatches_scan(case, is_anchored=True),
}


def measure(size: int, rounds: int) -> list[dict]:
    """Time the steps in turn and return rows of ratios.csv."""
    case = Case(size)
    scans = {name: build(case) for name, build in METHODS.items()}
    samples = in_turn({name: call for name, (_, call) in scans.items()}, rounds)
    timings = compared(samples, FLOOR)
    return [
        score(
            "walkers",
            name,
            case.dim,
            FLOOR,
            timings[name],
            asked=ASKED[size] + ASKED_MORE[name] if name != FLOOR else "",
            peak_mb=peak_megabytes(compiled),
            moved_mb=bytes_accessed(compiled) / 1e6,
        )
        for name, (compiled, _) in scans.items()
    ]


@pytest.mark.parametrize("size", sizes(ASKED))
def test_walkers(benchmark, size):
    rows = benchmark.pedantic(measure, (size, ROUNDS[size]), rounds=1)
    record("ratios", rows)
