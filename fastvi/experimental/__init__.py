"""Kernels that no row of the benchmarks puts first: to try, and chosen by no configuration.

`OPS` has their operations as `fastvi.kernels.OPS` has those in use. A name is honoured, or refused
with the reason.

`triton`, of `woodbury`: the two passes of `implementation="pallas"` as Triton kernels, called
through jax-triton. They are as fast, and do not need the Triton backend of Pallas, which is
deprecated from jax 0.11.
"""

from fastvi.kernels._dispatch import Implementation, Op

OPS = {
    "woodbury": Op(
        "woodbury",
        {
            "triton": Implementation(
                "fastvi.experimental.triton_woodbury",
                ("cuda",),
                ("triton", "jax_triton"),
                extra="triton",
            )
        },
    )
}

__all__ = ["OPS"]
