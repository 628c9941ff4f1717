"""A third family is one file and one line."""

import jax.numpy as jnp
import numpy as np
import pytest

import fastvi
from fastvi import ConfigError, VIConfig
from fastvi.families import FAMILIES
from tests.support.toy_family import DiagonalNormal

CURVATURES = np.array([4.0, 2.0, 1.0, 0.5])
NBETA, GAMMA = 50.0, 2.0
LLC = 0.5 * np.sum(NBETA * CURVATURES / (NBETA * CURVATURES + GAMMA))
DATA = (jnp.zeros((300, 1)),)


def bowl(w, batch):
    return 0.5 * jnp.sum(jnp.asarray(CURVATURES, w.dtype) * w**2) + 0.0 * jnp.sum(batch[0])


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(FAMILIES, "toy", DiagonalNormal)


@pytest.mark.parametrize("method", ["variational", "auto"])
def test_a_toy_family_fits_a_quadratic(method):
    result = fastvi.estimate_llc(
        bowl,
        jnp.zeros(4),
        DATA,
        family="toy",
        method=method,
        nbeta=NBETA,
        localization=GAMMA,
        num_chains=2,
        steps=400,
        progress=False,
    )
    assert abs(result.llc - LLC) < max(4 * result.llc_sem, 0.01 * LLC)
    assert result.config.family == "toy"


def test_fields_of_other_families_are_refused():
    with pytest.raises(ConfigError, match="M must be left out with family='toy'"):
        fastvi.estimate_llc(bowl, jnp.zeros(4), DATA, family="toy", M=3, progress=False)
    assert VIConfig(family="toy").family_settings == DiagonalNormal.Settings()
