import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

# Commands in tests leave no programs in anybody's home; must precede the import of jax.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

import jax
import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

from tests.support import annotations
from tests.support.slow_tests import read_listed

MARK = "as_users_compile"
# GiB of a process above which a file of tests gives back what it compiled, and those by which it
# has grown when the next one does.
MEMORY, GROWTH = 3.0, 0.7
memory_to_forget_at = [MEMORY]

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
    from fastvi._compilation import compiler_options

    if not jax.config.read("jax_disable_most_optimizations"):
        return jax.jit(function, **options)
    return jax.jit(function, compiler_options=compiler_options(0), **options)


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
    """Keep compiled programs where JAX_COMPILATION_CACHE_DIR names a folder, apart for each worker.

    jax does not lock the folder. By default there is none: hashing all programs takes a twentieth.
    """
    if folder := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        jax.config.update("jax_compilation_cache_dir", str(Path(folder) / worker))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    # the whole heap is looked through after each file; in between, it would take a twentieth more
    gc.set_threshold(10_000, 20, 50)
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
    # lines of source in a program are for profilers
    jax.config.update("jax_traceback_in_locations_limit", 0)
    if wanted != "0":
        use_quick_options()


def use_quick_options():
    """Compile every program with the options that the package has for programs that run once.

    XLA reads its flags when the first program compiles, and ends a process for one that it does not
    know, so another process tries them first.
    """
    from fastvi._compilation import ONCE_OPTIONS, QUICK_OPTIONS

    # a program in one piece takes a fifth less of the processor; pieces in parallel are sooner on
    # idle cores
    ONCE_OPTIONS["xla_cpu_parallel_codegen_split_count"] = 1
    QUICK_OPTIONS.update(ONCE_OPTIONS)
    flags = [f"--{name}={str(value).lower()}" for name, value in ONCE_OPTIONS.items()]
    given = os.environ.get("XLA_FLAGS", "")
    if flags[0] in given:  # a worker has them from the process that started it
        return
    environment = {**os.environ, "XLA_FLAGS": " ".join([given, *flags]).strip()}
    trial = [sys.executable, "-c", "import jaxlib.xla_client; jaxlib.xla_client.CompileOptions()"]
    if subprocess.run(trial, env=environment, capture_output=True, check=False).returncode == 0:
        os.environ["XLA_FLAGS"] = environment["XLA_FLAGS"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the tests that took long as slow, before slow ones are left out.

    And hold every file of a test that also runs compiled as people compile to saying so.

    `make test` finds those files by the words. A test of full optimisations is one of them, since
    XLA's flags hold for the whole process.
    """
    listed = read_listed()
    for item in items:
        if item.nodeid in listed:
            item.add_marker("slow")
    for item in items:
        if "fully_optimised" in item.fixturenames:
            item.add_marker(MARK)
        if item.get_closest_marker(MARK) is None:
            continue
        text = item.path.read_text(encoding="utf-8")
        if not (MARK in text or "fully_optimised" in text):
            raise pytest.UsageError(f"{item.nodeid} is also compiled as people do: {MARK}")


@pytest.fixture
def fully_optimised():
    """Compile with all optimisations, whatever the other tests do."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True, scope="module")
def objects_of_a_file_leave_memory():
    """Collect what a file leaves, and its programs too where the process has grown.

    What stays is frozen until the process has grown. Looking through jax and what it has traced,
    again and again, would take a sixth of the suite's time.
    """
    yield
    forgets = resident() > memory_to_forget_at[-1]
    if forgets:
        gc.unfreeze()
        jax.clear_caches()
    gc.collect()
    gc.freeze()
    if forgets:  # what is not given back to the system is used again
        memory_to_forget_at.append(max(MEMORY, resident() + GROWTH))


def resident():
    """Return the memory of this process in GiB, or its peak where the system does not say."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * resource.getpagesize() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
