"""Programs that one process has compiled are found by the next."""

import os
import subprocess
import sys

import jax
import pytest

import fastvi
from fastvi import cli

PROGRAM = """
import sys
from jax import monitoring
seen = []
monitoring.register_event_listener(lambda event, **_: seen.append(event))
import fastvi
print(fastvi.use_compilation_cache(sys.argv[1] or None))
import jax, jax.numpy as jnp
jax.jit(lambda x: jnp.sin(x) * 2)(jnp.ones(3)).block_until_ready()
print(seen.count("/jax/compilation_cache/cache_hits"))
print(seen.count("/jax/compilation_cache/cache_misses"))
"""


def compile_in_a_process(folder, **environment):
    env = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "1"} | environment
    env.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, "-c", PROGRAM, folder]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    place, hits, misses = done.stdout.split()
    return place, int(hits), int(misses)


def test_the_second_process_compiles_nothing(tmp_path):
    home = tmp_path / "fastvi"
    place, hits, misses = compile_in_a_process("", XDG_CACHE_HOME=str(tmp_path))
    assert hits == 0 < misses
    assert os.path.dirname(place) == str(home)
    assert os.stat(home).st_mode & 0o077 == 0
    again, hits, misses = compile_in_a_process(str(home))
    assert again == place
    assert misses == 0 < hits


@pytest.mark.parametrize(("enabled", "folder", "asks"), [(1, None, 1), (0, None, 0), (1, "x", 0)])
def test_commands_keep_programs_unless_told_otherwise(enabled, folder, asks, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "use_compilation_cache", lambda: asked.append(1))
    before = jax.config.jax_enable_compilation_cache, jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_enable_compilation_cache", bool(enabled))
        jax.config.update("jax_compilation_cache_dir", folder)
        cli.keep_programs()
    finally:
        jax.config.update("jax_enable_compilation_cache", before[0])
        jax.config.update("jax_compilation_cache_dir", before[1])
    assert len(asked) == asks


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        fastvi.use_compilation_cache(tmp_path / "file")
