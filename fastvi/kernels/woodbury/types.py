"""What the kernel reads and writes, for one chain; chains are added by vmap in front."""

from typing import NamedTuple

from fastvi._typing import Array, Float, Int, Scalar


class Mixture(NamedTuple):
    """A mixture of factor analyzers with a shared precision core, in whitened coordinates.

    Component m is `N(offset_m, D^{1/2} (P^{-1} + A_m^T A_m) D^{1/2})` with `D^{1/2} = diag
    exp(log_scale)`, `P = I + core^T core` and `A_m = factors[m]`. `offsets` has 0 rows (all means
    zero), 1 row (a shared mean) or one row for each component. Masked columns of a factor are zero
    rows here.
    """

    log_weights: Float[Array, " comp"]
    offsets: Float[Array, "locs dim"]
    log_scale: Float[Array, " dim"]
    core: Float[Array, "core dim"]
    factors: Float[Array, "comp rank dim"]


class Grams(NamedTuple):
    """The small matrices that depend on the parameters alone.

    One evaluation serves all draws of a step.

    With C = L L^T, `core_half` and `factor_half` are L^{-1}, so that C^{-1} = L^{-T} L^{-1} is two
    small products.
    """

    core_half: Float[Array, "core core"]  # of C_B = I + B B^T
    cross: Float[Array, "comp core rank"]  # B A_m^T
    factor_half: Float[Array, "comp rank rank"]  # of C_m = I + A_m A_m^T + cross^T cross
    log_det: Float[Array, " comp"]  # log |Sigma_m|
    ridged: Scalar  # factorisations that took a ridge


class Noise(NamedTuple):
    """The standard normal variables and the label that one draw consumes."""

    label: Int[Array, ""]
    eps: Float[Array, " dim"]
    zeta: Float[Array, " core"]
    z: Float[Array, " rank"]


class Draw(NamedTuple):
    """One draw with everything that its gradients need.

    `x = x_core + A_m^T z` is the draw in units of D^{1/2} about the mean of its component;
    `displacement = offset + D^{1/2} x` is the draw itself, `log_prob` and `score` the density and
    its gradient there.
    """

    x: Float[Array, " dim"]
    x_core: Float[Array, " dim"]
    core_x: Float[Array, " core"]  # B x_core
    displacement: Float[Array, " dim"]
    log_prob: Scalar
    responsibilities: Float[Array, " comp"]
    score: Float[Array, " dim"]
