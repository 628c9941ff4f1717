"""The ledger: prices, sums and full-gradient equivalents, worked out by hand."""

import pytest

from fastvi.target.work import GRADIENT, HESSIAN_PRODUCT, LOSS, Work


@pytest.mark.parametrize(
    ("work", "sample_gradients"),
    [
        (Work(gradients=5), 5),
        (Work(losses=6), 2),
        (Work(hessian_products=7), 14),
        (Work(gradients=5, losses=6, hessian_products=7), 21),
        (Work(), 0),
    ],
)
def test_prices(work, sample_gradients):
    assert (GRADIENT, LOSS, HESSIAN_PRODUCT) == (1, 1 / 3, 2)
    assert work.sample_gradients == pytest.approx(sample_gradients)


def test_work_adds_up():
    total = Work(gradients=1, losses=2) + Work(losses=3, hessian_products=4)
    assert total == Work(gradients=1, losses=5, hessian_products=4)


def test_a_pass_over_all_data_is_one_full_gradient():
    assert Work(gradients=60_000).fge(60_000) == 1
    assert Work(losses=60_000, hessian_products=60_000).fge(60_000) == pytest.approx(7 / 3)
