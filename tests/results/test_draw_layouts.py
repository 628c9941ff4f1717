"""Draws in the layouts of arviz and devinterp."""

import json

import numpy as np
import pytest

import fastvi

WALKERS, DRAWS, EXAMPLES, TOKENS, NBETA, GAMMA = 3, 20, 5, 2, 30.0, 4.0


def made(**changes):
    """Return draws whose numbers are known, and independent of each other."""
    rng = np.random.default_rng(0)
    energies = rng.gamma(2.0, size=(WALKERS, DRAWS, 2)).astype(np.float32)
    fields = {
        "energies": energies,
        "slopes": 2 * energies,
        "radius2": rng.gamma(3.0, size=(WALKERS, DRAWS)).astype(np.float32),
        "losses": {"a-1": rng.normal(size=(WALKERS, DRAWS, EXAMPLES, TOKENS)).astype(np.float32)},
        "init_losses": {"a-1": np.ones((EXAMPLES, TOKENS), np.float32)},
        "observables": {"norm": rng.normal(size=(WALKERS, DRAWS, 4))},
        "nbeta": NBETA,
        "localization": GAMMA,
        "n_data": 100,
        "dim": 7,
        "center_norm": 2.0,
        "init_loss": 0.5,
        "thin": 4,
        "fge": 12.0,
        "displacement": rng.normal(size=(WALKERS, DRAWS, 7)),
    }
    return fastvi.PosteriorDraws(**{**fields, **changes})


def group(container, name):
    found = getattr(container, name, None)
    return (
        container[name].to_dataset() if found is None or not hasattr(found, "data_vars") else found
    )


def test_arviz_has_draws_and_losses(tmp_path):
    draws = made()
    container = fastvi.to_arviz(draws)
    posterior, statistics = group(container, "posterior"), group(container, "sample_stats")
    assert posterior["llc"].dims == ("chain", "draw")
    np.testing.assert_allclose(posterior["llc"], draws.llc)
    np.testing.assert_allclose(posterior["L"], 0.5 + draws.llc / NBETA)
    np.testing.assert_array_equal(posterior["norm"], draws.observables["norm"])
    np.testing.assert_array_equal(posterior["displacement"], draws.displacement)
    assert posterior.attrs["llc"] == pytest.approx(draws.llc.mean())
    # the posterior is exp(-n beta (L_n - L_n(w*)) - gamma |w - w*|^2 / 2)
    np.testing.assert_allclose(
        statistics["lp"], -NBETA * (posterior["L"] - 0.5) - 0.5 * GAMMA * draws.radius2, rtol=1e-6
    )
    likelihood = group(container, "log_likelihood")["a-1"]
    assert likelihood.dims == ("chain", "draw", "a-1_dim_0", "a-1_dim_1")
    np.testing.assert_array_equal(likelihood, -draws.losses["a-1"])
    np.testing.assert_array_equal(group(container, "constant_data")["init_loss_a-1"], 1.0)
    container.to_netcdf(str(tmp_path / "draws.nc"))
    xarray = pytest.importorskip("xarray")
    with xarray.open_dataset(tmp_path / "draws.nc", group="log_likelihood") as stored:
        np.testing.assert_array_equal(stored["a-1"], -draws.losses["a-1"])


def test_arviz_tells_how_draws_depend_on_each_other():
    arviz = pytest.importorskip("arviz")
    found = arviz.ess(fastvi.to_arviz(made()), var_names=["llc"])["llc"]
    assert 0.4 * WALKERS * DRAWS < float(found) < 2 * WALKERS * DRAWS


def test_arviz_of_draws_without_losses_has_no_likelihood():
    container = fastvi.to_arviz(made(losses={}, init_losses={}, displacement=None))
    assert not hasattr(container, "log_likelihood")
    assert "displacement" not in group(container, "posterior")
    with pytest.raises(fastvi.DataError, match="'L' has the name"):
        fastvi.to_arviz(made(observables={"L": np.zeros((WALKERS, DRAWS))}))


def test_the_tree_of_devinterp_gives_the_llc_and_losses_of_the_draws():
    draws = made()
    ids = np.arange(EXAMPLES * (TOKENS + 1)).reshape(EXAMPLES, TOKENS + 1)
    tree = fastvi.to_devinterp(draws, {"a-1": ids})
    found = tree.dataset
    # its llc: n beta (mean of sampling_loss_micro - mean of init_loss) of each chain
    micro = found["sampling_loss_micro"]
    assert micro.dims == ("chain", "step", "batch_sampling", "token_pos")
    n_beta = found.attrs["metadata"]["config"]["sampler"]["n_beta"]
    chains = n_beta * (
        micro.mean(["step", "batch_sampling", "token_pos"]) - found["init_loss"].mean()
    )
    np.testing.assert_allclose(chains, draws.llc.mean(axis=1), rtol=1e-4)
    assert found["sampling_loss"].dims == ("chain", "draw", "batch", "token_pos")
    assert found["loss_a_1"].dims == ("chain", "draw", "batch_a_1", "token_pos")
    np.testing.assert_array_equal(found["loss_a_1"], draws.losses["a-1"])
    np.testing.assert_array_equal(found["input_ids_a_1"], ids)
    assert found["input_ids_a_1"].dims == ("batch_a_1", "token")
    assert tree.attrs["nbeta"] == NBETA
    assert tree.attrs["localization"] == GAMMA
    assert tree.attrs["llc"] == pytest.approx(draws.llc.mean())
    json.dumps(tree.attrs)  # zarr keeps attributes as JSON


def test_the_tree_of_devinterp_survives_zarr(tmp_path):
    xarray = pytest.importorskip("xarray")
    tree = fastvi.to_devinterp(made())
    tree.to_zarr(tmp_path / "tree.zarr", consolidated=False)
    with xarray.open_datatree(tmp_path / "tree.zarr", engine="zarr", consolidated=False) as found:
        np.testing.assert_array_equal(found["loss_a_1"], tree["loss_a_1"])
        assert found.attrs["metadata"] == tree.attrs["metadata"]
        assert (found["input_ids_a_1"] == -1).all()


def test_losses_of_examples_are_of_one_token():
    losses = np.ones((WALKERS, DRAWS, EXAMPLES), np.float32)
    found = fastvi.to_devinterp(made(losses={"one": losses, "2": losses})).dataset
    assert found["loss_one"].shape == (WALKERS, DRAWS, EXAMPLES, 1)
    assert "loss__2" in found


@pytest.mark.parametrize(
    ("losses", "ids", "message"),
    [
        ({"a": (5,), "b": (5, 2)}, {}, "'a' has 1, 'b' has 2"),
        ({"a b": (5,), "a-b": (5,)}, {}, "must differ in letters"),
        ({"a": (5,)}, {"b": np.zeros((5, 2), int)}, "of 'b', whose losses"),
        ({"a": (5,)}, {"a": np.zeros((5, 3), int)}, r"shape \(5, 2\)"),
        ({"a": (5,)}, {"a": np.zeros((5, 2))}, "must be integers"),
    ],
)
def test_what_does_not_fit_the_tree_is_refused(losses, ids, message):
    arrays = {name: np.zeros((WALKERS, DRAWS, *shape)) for name, shape in losses.items()}
    with pytest.raises(fastvi.DataError, match=message):
        fastvi.to_devinterp(made(losses=arrays), ids)
