import gc
import os
import resource
from pathlib import Path

import jax
import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

from tests.support import annotations

MEMORY = 3.0  # GiB of a process above which a file of tests gives back what it compiled

# Hold the annotated functions on arrays to their shapes and dtypes; must precede the first import
# of fastvi. Not fastvi.config.vi: beartype refuses typing.Self on a single method. Nor what has no
# arrays of its own, such as the command line, and the integrations, to which people pass anything.
CHECKED = (
    "_compilation",
    "api",
    "demos",
    "evaluation",
    "families",
    "fitting",
    "flows",
    "geometry",
    "kernels",
    "observables",
    "results.estimate",
    "results.findings",
    "results.report",
    "results.resume",
    "results.work",
    "sampling",
    "target",
)
install_import_hook([f"fastvi.{name}" for name in CHECKED], f"{annotations.__name__}.hold")

# The same examples every run; a fixture that sets float64 is the same for all examples of a test.
settings.register_profile(
    "fastvi",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("fastvi")


def enable_x64(enabled):
    """Set float64 for a block.

    The name that jax 0.7 to 0.12 all have, in the place where each has it.
    """
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(enabled)
    from jax.experimental import enable_x64 as experimental

    return experimental(enabled)


def quick_jit(function, **options):
    """jax.jit for programs of a test that run a few times.

    Half the time to compile, but where tests compile fully.
    """
    from fastvi._compilation import quick_compilation

    if not jax.config.read("jax_disable_most_optimizations"):
        return jax.jit(function, **options)
    least = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.jit(function, compiler_options={**least, **(quick_compilation() or {})}, **options)


def also_as_users_compile(cases, *chosen):
    """Return parameters of a test; the chosen ones also run compiled as people compile them."""
    assert set(chosen) <= set(cases)
    return [
        pytest.param(case, marks=pytest.mark.as_users_compile) if case in chosen else case
        for case in cases
    ]


@pytest.fixture
def x64():
    with enable_x64(True):
        yield


def pytest_configure(config):
    """Keep compiled programs between sessions, apart for each worker: jax does not lock the folder.

    Both ways to compile may share a folder: jax's key of a program has the compiler's options in
    it.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    folder = Path(config.rootpath) / ".pytest_cache" / "jax" / worker
    jax.config.update(
        "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder))
    )
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if config.option.markexpr == "not slow":
        compile_quickly()


def compile_quickly():
    """Leave out most of XLA's optimisations, here and in processes that tests start.

    Nearly all programs run once.

    The slow tests compile as people do, and so do those of `-m as_users_compile`, which are a part
    of the fast ones; all do with JAX_DISABLE_MOST_OPTIMIZATIONS=0.
    """
    wanted = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    jax.config.update("jax_disable_most_optimizations", wanted != "0")
    if wanted != "0":
        from fastvi._compilation import QUICK_OPTIONS

        # a program in one piece takes a fifth less of the processor; pieces in parallel are sooner
        # on idle cores
        QUICK_OPTIONS["xla_cpu_parallel_codegen_split_count"] = 1


def pytest_collection_finish(session):
    """Collect garbage rarely: tracing makes many objects, and few of them are in cycles.

    It saves 8 % of the suite's time. The memory is given back after each file.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 50, 1000)


@pytest.fixture
def fully_optimised():
    """Compile as people do, whatever the other tests do."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_leave_memory():
    """Forget what a file compiled where the process has grown.

    An executable keeps its code for good otherwise.
    """
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # GiB on Linux
    if peak > MEMORY:
        jax.clear_caches()
        gc.collect()
