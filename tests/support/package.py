"""Install a wheel and a sdist, each in an environment of its own, and use what came: a check of CI.

The folder of the archives is the argument.
"""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

PROGRAM = """
import importlib.metadata, importlib.resources
import jax.numpy as jnp
import fastvi

assert "site-packages" in fastvi.__file__, fastvi.__file__
assert importlib.metadata.version("fastvi") == fastvi.__version__
assert (importlib.resources.files("fastvi") / "py.typed").is_file()
loss = lambda w, batch: 0.5 * jnp.sum(w**2)
options = dict(nbeta=100.0, localization=1.0, error=0.1, progress=False)
found = fastvi.estimate_llc(loss, jnp.zeros(4), (jnp.ones((100, 1)),), **options)
assert abs(found.llc - 2 * 100 / 101) < 5 * found.llc_sem, found.llc_text
print(fastvi.__version__, found.llc_text)
"""


def try_archive(archive: Path) -> None:
    """Install it without extras, and estimate an llc that is known."""
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin" / "python"
        quiet = ["--quiet", "--no-input", "--disable-pip-version-check"]
        subprocess.run([python, "-m", "pip", "install", *quiet, archive], check=True)
        done = subprocess.run(
            [python, "-c", PROGRAM], cwd=folder, capture_output=True, text=True, check=False
        )
    if done.returncode:
        sys.exit(f"{archive.name} does not work:\n{done.stderr}")
    print(f"{archive.name}: {done.stdout.strip()}")


if __name__ == "__main__":
    archives = sorted(Path(sys.argv[1]).resolve().iterdir())
    if {one.suffix for one in archives} != {".whl", ".gz"}:
        sys.exit(f"expected a wheel and a sdist; got {[one.name for one in archives]}")
    for archive in archives:
        try_archive(archive)
