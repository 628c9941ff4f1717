"""The parts of the benchmark harness that decide something."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import bench_elbo, gate, harness, report
from bench.problems import trained_tanh_network
from fastvi import LocalPosterior, make_flat_objective
from fastvi.target.data import Problem, hold

MACHINE = {
    "device": "cpu",
    "cpu": "a",
    "cores": "2",
    "load_average": "0",
    "jax": "0",
    "commit": "c",
}


def row(date, ratio, low, high, *, name="fastvi", asked="2", size="1000", **machine):
    values = {
        "group": "step",
        "name": name,
        "size": size,
        "floor": "gradient",
        "asked": asked,
        "date": date,
    }
    blank = dict.fromkeys(("ms", "moved_mb", "least_mb", "peak_mb"), "")
    return {
        **values,
        **blank,
        "ratio": ratio,
        "ratio_p20": low,
        "ratio_p80": high,
        "ratio_least": ratio,
        **MACHINE,
        **machine,
    }


@pytest.mark.parametrize(
    ("low", "verdict"), [("1.0", "ok"), ("2.08", "ok"), ("2.1", "slower"), ("nan", "slower")]
)
def test_the_gate_closes_beyond_the_spread(low, verdict):
    earlier, judged = row("1", "1.5", "1.4", "1.6"), row("2", "2.2", low, "2.3")
    [(_, found, ratio, bound)] = gate.compare([earlier, judged], "2", 1.3)
    assert (found, ratio) == (verdict, 2.2)
    np.testing.assert_allclose(bound, 1.3 * 1.6)


def test_the_gate_compares_like_with_like():
    rows = [
        row("1", "1", "1", "1", cpu="b"),
        row("1", "1", "1", "1", name="sgld"),
        row("2", "9", "9", "9"),
    ]
    assert [verdict for _, verdict, *_ in gate.compare(rows, "2", 1.3)] == ["new"]
    assert not gate.compare([row("1", "1", "1", "1"), row("2", "9", "9", "9", asked="")], "2", 1.3)


def test_rows_stay_out_of_the_checkout_unless_asked_for(monkeypatch, tmp_path):
    committed, own = tmp_path / "results", tmp_path / "runs"
    monkeypatch.setattr(harness, "RESULTS", committed)
    monkeypatch.setattr(harness, "RUNS", own)
    monkeypatch.setattr(harness, "copy_bandwidth", lambda: 1.0)
    monkeypatch.setattr(harness, "TABLES", {})
    for keep, folder in (("", own), ("0", own), ("1", committed)):
        monkeypatch.setenv(harness.KEEP, keep)
        harness.record("ratios", [{"name": "a", "ratio": 1.0}])
        assert (folder / "ratios.csv").is_file()
    assert [len(gate.load(folder)) for folder in (own, committed)] == [2, 1]
    ignored = (
        (harness.pathlib.Path(harness.__file__).parents[1] / ".gitignore").read_text().splitlines()
    )
    assert "/bench/runs/" in ignored


def test_ratios_are_formed_round_by_round(monkeypatch):
    times = iter([1.0, 2.0, 10.0, 20.0, 4.0, 8.0])  # a machine that slows down and recovers
    monkeypatch.setattr(harness, "seconds", lambda call: next(times))
    timings = harness.against("floor", {"floor": lambda: 0.0, "other": lambda: 0.0}, 3)
    assert timings["floor"].ratio == (1.0, 1.0, 1.0)
    assert timings["other"].ratio == (2.0, 2.0, 2.0)
    assert timings["other"].seconds[1] == 8.0
    assert timings["other"].least == 2.0


def test_a_step_is_compared_with_several_floors_of_the_same_rounds():
    samples = {
        "ours": np.array([1.0, 2.0]),
        "gradient": np.array([1.0, 1.0]),
        "peer": np.array([4.0, 4.0]),
    }
    assert harness.compared(samples, "gradient")["ours"].least == 1.0
    assert harness.compared(samples, "peer")["ours"].ratio == pytest.approx((0.3, 0.375, 0.45))


def test_the_law_of_a_step_is_the_line_that_its_rows_lie_on(monkeypatch):
    rows = [row("1", "9", "9", "9", name="step", size=str(dim)) for dim in (100, 200, 300, 400)]
    rows = [
        {
            **one,
            "group": "scale",
            "ms": int(one["size"]) * 5e-5,
            "peak_mb": int(one["size"]) * 132e-6,
        }
        for one in rows
    ]
    rows[0]["ms"] *= 0.5  # in cache
    monkeypatch.setattr(report, "load", lambda: rows)
    assert "from 300 on: 50 ns a parameter (points within 0 %) and 132 bytes" in report.scale()
    assert "At d = 1e8 that is 5 s a step and 13.2 GB" in report.scale()


def test_the_judge_of_elbos_finds_log_z_where_q_is_the_posterior():
    dim, nbeta, gamma, curvature = 3, 100.0, 2.0, jnp.array([0.0, 1.0, 5.0])
    posterior = LocalPosterior(jnp.ones(dim), jnp.float32(nbeta), jnp.float32(gamma))
    objective = make_flat_objective(lambda w, batch: 0.25 + 0.5 * jnp.sum(curvature * (w - 1) ** 2))
    judge = bench_elbo.make_judge(objective, Problem(posterior, hold(jnp.zeros((4, 1))), 2))
    precision = nbeta * curvature + gamma
    draws = jax.random.normal(jax.random.key(0), (32, dim)) / jnp.sqrt(precision)
    log_q = jnp.sum(jax.scipy.stats.norm.logpdf(draws, 0, precision**-0.5), axis=1)
    found = judge(draws, log_q)
    log_z = -nbeta * 0.25 + 0.5 * float(jnp.sum(jnp.log(2 * jnp.pi / precision)))
    assert found.elbo == pytest.approx(log_z, abs=1e-4)
    assert found.sem < 1e-5
    wide = judge(
        2 * draws, jnp.sum(jax.scipy.stats.norm.logpdf(2 * draws, 0, 2 * precision**-0.5), axis=1)
    )
    assert wide.elbo < log_z - 1


def test_the_peer_is_there_within_two_errors_of_the_target():
    course = [
        (1.0, bench_elbo.Score(0.0, 1.0)),
        (2.0, bench_elbo.Score(7.5, 1.0)),
        (3.0, bench_elbo.Score(12.0, 1.0)),
    ]
    assert bench_elbo.seconds_to(course, bench_elbo.Score(10.0, 1.0)) == 2.0
    assert bench_elbo.seconds_to(course, bench_elbo.Score(20.0, 1.0)) == float("inf")


def test_the_trained_network_is_at_a_minimum():
    num_data = 2_000
    nbeta = num_data / np.log(num_data)
    loss, center, data = trained_tanh_network(1_000, num_data)
    noise = jnp.sqrt(2 * loss(center, data))
    others = data[1] + noise * jax.random.normal(jax.random.key(0), (16, *data[1].shape))
    gradient = jax.jit(jax.grad(loss))
    # what a move can gain at most under a localizer of 1, in nats
    gain, *of_noise = (
        0.5 * nbeta**2 * jnp.sum(gradient(center, (data[0], y)) ** 2) for y in (data[1], *others)
    )
    assert gain < 0.3
    assert np.mean(of_noise) > 2  # 1.6 to 6 by one draw
    assert 0.2 < noise < 0.3  # 0.3 less what is along the tangents


def test_the_pages_hold_what_the_rows_say(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_the_report_fills_its_marks_with_the_last_row_of_the_machine(monkeypatch):
    rows = [
        row("1", "3", "3", "3"),
        row("2", "7", "7", "7", cpu="b"),
        row("3", "1.234", "1.2", "1.3"),
    ]
    monkeypatch.setattr(report, "load", lambda: rows)
    page = report.filled("a\n<!-- bench:speed -->\nold\n<!-- /bench:speed -->\nz\n")
    assert (
        page == "a\n<!-- bench:speed -->\n| d | fastvi |\n| --- | --- |\n"
        "| 1,000 | 1.23 |\n<!-- /bench:speed -->\nz\n"
    )
    assert report.filled(page) == page
