"""Programs are shared by what a loss computes, and die with it."""

import functools
import gc
import os
import subprocess
import sys
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi._compilation import (
    MOST_DROPPED,
    ONCE_BYTES,
    QUICK_BYTES,
    CompileWatch,
    ProgramStore,
    compiler_options,
    options_by_speed,
)
from fastvi.api.plan import fit_settings
from fastvi.fitting.stages import programs_for
from fastvi.target.data import Problem, hold
from fastvi.target.fingerprint import fingerprint_loss
from fastvi.target.posterior import LocalPosterior

DATA = (np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32),)
SETTINGS = {"num_chains": 2, "steps": 50, "early_stop": False, "progress": False, "M": 1, "r": 0}
HESSIAN = jnp.array([4.0, 2.0, 1.0, 0.5])


def loss(w, batch):
    return 0.5 * jnp.mean((batch[0] @ w["a"]) ** 2)


def test_nothing_is_compiled_twice():
    def estimate(seed, shift, **changes):
        data = (DATA[0] + shift,)
        return fastvi.estimate_llc(
            loss, {"a": jnp.zeros(4)}, data, **({"key": jax.random.key(seed)} | SETTINGS | changes)
        )

    with CompileWatch() as watch:
        first = estimate(0, 0.0)
    assert watch.programs > 0
    with CompileWatch() as watch:
        second = estimate(1, 0.0)
        # neither do other data, nbeta or localization of the same shapes
        estimate(2, 0.1, nbeta=20.0, localization=3.0)
    assert watch.programs == 0
    assert second.llc != first.llc
    assert second.timings.compile < first.timings.compile


def test_what_is_compiled_ahead_is_what_is_run(caplog):
    jax.config.update("jax_log_compiles", True)
    try:
        fastvi.estimate_llc(
            lambda w, batch: 0.5 * jnp.mean((batch[0] @ w["a"] - 0.25) ** 2),
            {"a": jnp.zeros(4)},
            DATA,
            **SETTINGS | {"method": "variational", "M": 2, "r": 1},
        )
    finally:
        jax.config.update("jax_log_compiles", False)
    said = [record.getMessage() for record in caplog.records]
    for stage in ("prepare", "launch", "steps", "finish"):
        assert sum(f"Finished XLA compilation of jit({stage})" in one for one in said) == 1, stage


def test_a_loss_is_traced_once_for_what_is_known_of_it():
    """Two sizes tell its form, two traces that it is deterministic, each program has one more.

    One more tells how products with its Hessian are found, of an example.
    """
    traced = []

    def counted(w, batch):
        traced.append(batch[0].shape)
        return 0.5 * jnp.mean((batch[0] @ w["a"] - 0.5) ** 2)

    given = counted, {"a": jnp.zeros(4)}, DATA
    options = SETTINGS | {"method": "variational", "batch_size": 8}
    fastvi.estimate_llc(*given, **options)
    programs = len(("look", "look at half", "prepare", "steps", "finish"))
    assert len(traced) <= 2 + 2 + programs + 1
    traced.clear()
    fastvi.estimate_llc(*given, **options, key=1)
    assert len(traced) == 2 + 2


def test_the_host_computes_in_numpy(caplog):
    """Eager arithmetic would compile a program for each operation."""
    jax.config.update("jax_log_compiles", True)
    try:
        fastvi.estimate_llc(
            lambda w, batch: 0.5 * jnp.mean((batch[0][:, :3] @ w["a"] - 0.125) ** 2),
            {"a": np.zeros(3, np.float32)},
            (DATA[0][:47],),
            **SETTINGS | {"method": "reweight", "M": 2, "r": 1},
        )
    finally:
        jax.config.update("jax_log_compiles", False)
    said = [record.getMessage() for record in caplog.records]
    for name in ("add", "multiply", "_mean", "broadcast_in_dim", "_lstsq", "_var", "integer_pow"):
        assert not any(f"Finished XLA compilation of jit({name})" in one for one in said), name


def test_a_saddle_needs_no_program_of_its_own(caplog):
    def estimate(sign):
        """Fit where the last of the curvatures is negative, or is not."""
        curvatures = jnp.asarray([4.0, 2.0, 1.0, 0.02 * sign])
        return fastvi.estimate_llc(
            lambda w, batch: 0.5 * jnp.mean(batch[0] ** 2) * jnp.sum(curvatures * w**2),
            jnp.zeros(4),
            DATA,
            **SETTINGS | {"method": "variational", "localization": 2.0, "throw": False},
        )

    def compiled(sign):
        caplog.clear()
        jax.config.update("jax_log_compiles", True)
        try:
            result = estimate(sign)
        finally:
            jax.config.update("jax_log_compiles", False)
        said = [record.getMessage() for record in caplog.records]
        start = "Finished XLA compilation of jit("
        return result, {one[len(start) :].split(")")[0] for one in said if one.startswith(start)}

    minimum, at_minimum = compiled(1.0)
    saddle, at_saddle = compiled(-1.0)
    assert {"prepare", "steps", "finish"} <= at_saddle <= at_minimum
    names = [[finding.name for finding in one.health] for one in (minimum, saddle)]
    assert ["negative_curvature" in one for one in names] == [False, True]
    assert saddle.work.total_fge - minimum.work.total_fge == pytest.approx(9 / 3)


# The same function, another state.


class Scaled:
    """A loss with state, that is not hashable."""

    def __init__(self, scale):
        self.scale = scale

    def __eq__(self, other):
        return isinstance(other, Scaled) and self.scale == other.scale

    def __call__(self, w, batch):
        return 0.5 * self.scale * jnp.sum(HESSIAN * w**2) * jnp.mean(batch[0])

    method = __call__


ONES = (jnp.ones((50, 1)),)
SMALL = {"M": 1, "r": 0, "curvature_rank": 0}
CHEAP = SMALL | {
    "steps": 200,
    "method": "variational",
    "early_stop": False,
    "num_chains": 1,
    "progress": False,
    "key": 0,
}


def exact(scale, nbeta=50 / np.log(50)):
    return float(np.sum(scale * nbeta * HESSIAN / (scale * nbeta * HESSIAN + 1)) / 2)


def estimate(function):
    return fastvi.estimate_llc(function, jnp.zeros(4), ONES, **CHEAP).llc


GLOBAL = 1.0


def reads_global(w, batch):
    return Scaled(GLOBAL)(w, batch)


def test_a_loss_is_what_it_computes_now():
    """The object of a method changes: the number follows. It changes back: nothing is compiled."""
    scaled = Scaled(1.0)
    first = fastvi.estimate_llc(scaled.method, jnp.zeros(4), ONES, **CHEAP)
    assert first.llc == pytest.approx(exact(1.0), rel=0.05)
    scaled.scale = 0.01
    assert estimate(scaled.method) == pytest.approx(exact(0.01), rel=0.02)
    for later in (
        lambda: fastvi.correct(first, "sample", progress=False),
        lambda: fastvi.llc_on(first, ONES),
    ):
        with pytest.raises(fastvi.DataError, match="computes something else than at the estimate"):
            later()
    scaled.scale = 1.0
    with CompileWatch() as watch:
        for same in (
            scaled.method,
            scaled,
            functools.partial(scaled.method),
            reads_global,
            lambda w, b: Scaled(1.0)(w, b),
        ):
            assert estimate(same) == pytest.approx(exact(1.0), rel=0.05)
    assert watch.programs == 0


@pytest.mark.parametrize(
    "kind", ["method", "object", "partial", "global", "array", "array in place", "default"]
)
def test_state_is_seen(kind, monkeypatch):
    # in float32: of an array that it has to convert, jax 0.12 may keep what it converted before
    scaled, array = Scaled(1.0), np.ones((), np.float32)

    def reads_array(w, batch):
        return Scaled(1.0)(w, batch) * (array if kind == "array in place" else array.copy())

    functions = {
        "method": scaled.method,
        "object": scaled,
        "partial": functools.partial(scaled.method),
        "global": reads_global,
        "default": lambda w, batch, scaled=scaled: scaled(w, batch),
    }
    chosen = functions.get(kind, reads_array)
    first = read(chosen)
    scaled.scale = array[...] = 2.0
    monkeypatch.setattr(sys.modules[__name__], "GLOBAL", 2.0)
    assert read(chosen) != first
    scaled.scale = array[...] = 1.0
    monkeypatch.setattr(sys.modules[__name__], "GLOBAL", 1.0)
    assert read(chosen) == first


class Calling:
    """Calls a loss."""

    def __init__(self, function):
        self.function = function

    def method(self, w, batch):
        return self.function(w, batch)


class FlatScaled(Scaled):
    """An objective of the flat contract, not hashable, with three functions of its own."""

    def loss(self, w, batch):
        return self(w, batch)

    def grad(self, w, batch):
        return jax.grad(self)(w, batch)

    def value_and_grad(self, w, batch):
        return jax.value_and_grad(self)(w, batch)


class Full:
    """A full-data loss that is not hashable."""

    __hash__ = None

    def __init__(self, objective):
        self.objective = objective

    def __call__(self, w):
        return self.objective(w, ONES)


def test_flat_objectives_that_cannot_be_hashed_share_programs():
    objective, full = FlatScaled(1.0), Full(FlatScaled(1.0))

    def llc():
        return fastvi.fit(
            rng_key=0, objective=objective, wstar_flat=jnp.zeros(4), data=ONES, n_data=50,
            beta=1 / np.log(50),
            gamma=1.0, vi_cfg=SMALL | {"steps": 200}, loss_full_flat=full,
        )["lambda_hat"]  # fmt: skip

    assert float(llc()) == pytest.approx(exact(1.0), rel=0.05)
    with CompileWatch() as watch:
        assert float(llc()) == pytest.approx(exact(1.0), rel=0.05)
    assert watch.programs == 0
    objective.scale = full.objective.scale = 0.01
    assert float(llc()) == pytest.approx(exact(0.01), rel=0.02)


def test_a_loss_may_close_over_values_of_an_enclosing_trace():
    """The scale is mapped over, nothing else is."""

    def run(scale):
        objective = fastvi.make_flat_objective(Scaled(scale))
        return fastvi.fit(
            rng_key=0, objective=objective, wstar_flat=jnp.zeros(4), data=ONES, n_data=50,
            beta=1 / np.log(50),
            gamma=1.0, vi_cfg=SMALL | {"steps": 200},
        )["lambda_hat"]  # fmt: skip

    np.testing.assert_allclose(
        jax.vmap(run)(jnp.array([1.0, 0.01])), [exact(1.0), exact(0.01)], rtol=0.05
    )


# Fingerprints.


def problem(size=4):
    posterior = LocalPosterior(jnp.zeros(size), jnp.float32(10), jnp.float32(1))
    return Problem(posterior, hold(ONES), 8)


def read(function, **options):
    return fingerprint_loss(fastvi.make_flat_objective(function, **options), problem())


def host(x):
    return np.float32(0 * x)


VALUES = {
    "scalar": (1.0, 2.0),
    "small array": (np.ones(4), 2 * np.ones(4)),
    "jax array": (jnp.ones(4), 2 * jnp.ones(4)),
    "large array": (np.ones((100, 4)), np.concatenate([np.ones((99, 4)), np.zeros((1, 4))])),
    "dtype": (np.ones(4, np.float32), np.ones(4, np.int32)),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize(
    "around",
    [
        lambda f: f,
        jax.jit,
        jax.checkpoint,
        lambda f: lambda w: jax.lax.cond(w[0] > 0, f, lambda w: 0.0, w),
    ],
    ids=["plain", "jit", "checkpoint", "cond"],
)
def test_constants_count_by_content(name, around):
    def make(constant):
        return lambda w, batch: around(lambda w: jnp.sum(constant * w**2))(w)

    first, second = VALUES[name]
    copy = type(first)(first) if np.isscalar(first) else first.copy()
    assert read(make(first)) == read(make(copy))
    assert read(make(first)) != read(make(second))


def test_other_code_is_another_fingerprint():
    assert read(lambda w, b: jnp.sum(w)) == read(lambda w, b: jnp.sum(w))
    assert read(lambda w, b: jnp.sum(w)) != read(lambda w, b: jnp.prod(w))
    assert read(lambda w, b: w[0] - w[1]) != read(lambda w, b: w[1] - w[0])
    assert read(lambda w, b: jnp.sum(w), grad_loss_minibatch=lambda w, b: 0 * w) != read(
        lambda w, b: jnp.sum(w)
    )


def test_keys_that_are_closed_over_count():
    def make(key):
        return lambda w, batch: jnp.sum(w * jax.random.normal(key, w.shape))

    assert read(make(jax.random.key(0))) == read(make(jax.random.key(0)))
    assert read(make(jax.random.key(0))) != read(make(jax.random.key(1)))


def test_activations_with_derivative_rules_share():
    def make():
        return lambda w, batch: (
            jnp.sum(jax.nn.relu(w)) + jnp.sum(jax.nn.silu(batch[0])) + jax.nn.logsumexp(w)
        )

    assert read(make()) == read(make())


def test_callbacks_count_by_what_they_call():
    """They run on the host, where they see their state themselves.

    Made anew by each trace they are still the same.
    """

    def make(call):
        def function(w, batch):
            def inner(x):
                return call(x)

            shape = jax.ShapeDtypeStruct((), jnp.float32)
            return jnp.sum(w) + jax.pure_callback(inner, shape, jax.lax.stop_gradient(w[0]))

        return function

    def other(x):
        return np.float32(1 + 0 * x)

    assert read(make(host)) == read(make(host))
    assert read(make(host)) != read(make(other))
    first, second = Scaled(1.0), Scaled(1.0)
    assert read(make(first.method)) == read(make(first.method))
    assert read(make(first.method)) != read(make(second.method))


# Owners.


def function(value):
    def loss_fn(w, batch):
        return value

    return loss_fn


def stored(store, loss_name, key, loss_fn):
    """Return programs, here the number of the build."""
    return store.find(
        loss_name, key, (types.SimpleNamespace(loss_fn=loss_fn),), lambda borrowed: object()
    )


def test_programs_of_the_losses_used_last_are_kept():
    store = ProgramStore(most_losses=3, most_sets=4)
    functions = [function(i) for i in range(4)]
    first = [stored(store, i, "fit", functions[i]) for i in range(3)]
    assert [stored(store, i, "fit", functions[i]) for i in range(3)] == first
    stored(store, 3, "fit", functions[3])  # the fourth: the first goes
    assert [stored(store, i, "fit", functions[i]) for i in (1, 2)] == first[1:]
    assert stored(store, 0, "fit", functions[0]) is not first[0]


def test_one_loss_may_have_many_sets():
    store, loss_fn = ProgramStore(most_losses=2, most_sets=4), function(0)
    first = [stored(store, "a", key, loss_fn) for key in range(4)]
    assert [stored(store, "a", key, loss_fn) for key in range(4)] == first
    stored(store, "a", 4, loss_fn)
    assert [stored(store, "a", key, loss_fn) for key in (1, 2, 3)] == first[1:]


def test_programs_of_dead_losses_go_when_another_comes():
    class Programs:
        pass

    store, dead, alive = ProgramStore(), function(0), function(1)
    kept, gone = (
        store.find(name, "fit", (f,), lambda one: Programs())
        for name, f in (("a", alive), ("d", dead))
    )
    seen = weakref.ref(gone)
    del gone, dead
    gc.collect()
    assert seen() is not None  # the next may be of the same code
    store.find("n", "fit", (host,), lambda one: Programs())
    assert seen() is None
    assert store.find("a", "fit", (alive,), lambda one: Programs()) is kept


def test_programs_that_refer_to_each_other_go_after_some_more():
    """As functions of jax and their caches do, which only a collection of garbage finds."""

    class Programs:
        def __init__(self):
            self.itself = self

    gc.collect()
    gc.disable()
    try:
        store, seen = ProgramStore(), []
        for index in range(MOST_DROPPED + 1):  # each drops the one before it
            one = function(index)
            seen.append(weakref.ref(store.find(index, "fit", (one,), lambda _: Programs())))
            del one
            alive = [programs() is not None for programs in seen]
            assert all(alive) == (index < MOST_DROPPED)
        assert alive == [False] * MOST_DROPPED + [True]
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "make", [lambda f: f, functools.partial, lambda f: Calling(f).method], ids=["f", "p", "m"]
)
def test_programs_do_not_keep_a_loss_alive(make):
    constant = jnp.arange(4.0)

    def local(w, batch):
        return jnp.sum((w - constant) ** 2)

    seen, objective = weakref.ref(local), fastvi.make_flat_objective(make(local))
    programs = programs_for(objective, problem(), fit_settings(fastvi.VIConfig(eval_samples=8)))
    del local, objective
    gc.collect()
    assert seen() is None
    assert programs is not None


def test_programs_call_the_latest_function():
    """Two functions computed the same; the one that programs were made of has changed since."""
    first, second = Scaled(1.0), Scaled(1.0)
    store = ProgramStore()
    build = lambda one: jax.jit(lambda w: one(w, ONES))  # noqa: E731
    store.find("a", "fit", (first,), build)
    first.scale = 3.0
    assert float(store.find("a", "fit", (second,), build)(jnp.ones(4))) == pytest.approx(
        float(HESSIAN.sum() / 2)
    )


def loss_of_vector(w, batch):
    return jnp.sum(w**2) * jnp.mean(batch[0])


@pytest.mark.as_users_compile
def test_only_the_fast_run_leaves_optimisations_out(request):
    leaves_out = (
        request.config.option.markexpr == "not slow"
        and os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0"
    )
    assert jax.config.read("jax_disable_most_optimizations") == leaves_out


# Lengths.


@pytest.mark.usefixtures("x64")
def test_steps_beyond_the_plan_change_nothing():
    """103 steps are a chunk and 3 of the next; reports and records change no number."""
    options = CHEAP | {"steps": 103, "dtype": "float64"}
    first = fastvi.estimate_llc(loss_of_vector, jnp.zeros(3), ONES, **options)
    with CompileWatch() as watch:
        watched = fastvi.estimate_llc(
            loss_of_vector, jnp.zeros(3), ONES, **options | {"progress": print_no}
        )
        shorter = fastvi.estimate_llc(
            loss_of_vector, jnp.zeros(3), ONES, **options | {"steps": 51, "lr_schedule": "none"}
        )
    assert watch.programs == 0
    assert watched.traces["elbo"].shape == (1, 103)
    np.testing.assert_array_equal(watched.traces["elbo"], first.traces["elbo"])
    assert watched.llc == first.llc
    assert shorter.traces["lr"].shape == (1, 51)


def print_no(progress):
    """Take a report."""


# Memory.

MANY = """
import gc, sys
import jax.numpy as jnp, numpy as np
import fastvi

def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6

data = (np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32),)
kept, count, options = [], int(sys.argv[1]), eval(sys.argv[2])
for index in range(count):
    scale = np.float32(1 + 0.01 * index)
    loss = lambda w, batch: 0.5 * scale * jnp.mean((batch[0] @ w) ** 2)
    kept.append(fastvi.estimate_llc(loss, jnp.zeros(2), data, progress=False, **options))
    if index == 0:
        before = rss()
    print(index, round(rss() - before), kept[-1].llc, file=sys.stderr, flush=True)
    if "--forget" in sys.argv:
        kept.clear()
print(rss() - before)
"""


def growth(count, options, *flags):
    """Return how a process grows over so many estimates, each of another constant."""
    command = [sys.executable, "-c", MANY, str(count), repr(options), *flags]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--forget",)], ids=["kept", "forgotten"])
def test_forty_losses_take_bounded_memory(flags):
    assert growth(40, {}, *flags) < 300


def test_programs_that_compute_little_compile_soonest():
    once, quick, full = options_by_speed()
    given = [compiler_options(computed) for computed in (0.0, 2 * ONCE_BYTES, 2 * QUICK_BYTES)]
    assert given == [once, quick, full]
    assert full is None  # XLA's own


def test_a_fingerprint_counts_what_loss_and_gradient_compute_for_an_example():
    def computed(width, rows):
        def loss(w, batch):
            return jnp.mean(jnp.sum((batch[0][:, None] * w) ** 2, axis=-1))

        target = LocalPosterior(jnp.zeros(width), jnp.float32(1.0), jnp.float32(1.0))
        data = hold((np.zeros(rows, np.float32),))
        objective = fastvi.make_flat_objective(loss)
        return fingerprint_loss(objective, Problem(target, data, rows)).computed

    # an example's products and their squares are `width` numbers of four bytes each, and gradients
    # pass through both; the sum over examples and the mean are all that is beside them
    assert 4 * 4 * 256 <= computed(256, 64) <= 8 * 4 * 256
    assert computed(256, 64) / computed(64, 64) == pytest.approx(4, rel=0.05)
    assert computed(64, 128) == pytest.approx(computed(64, 64), rel=0.05)
