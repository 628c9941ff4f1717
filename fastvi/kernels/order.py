"""Order statistics without a sort, which takes XLA half a microsecond an entry on CPU."""

import jax
import jax.numpy as jnp
import numpy as np

from fastvi._typing import Array, Float, Scalar


def upper_median(values: Float[Array, " size"]) -> Scalar:
    """Return the entry of rank `size // 2` of non-negative numbers, NaN last.

    The bits of non-negative floating-point numbers rise with them, so the answer is found bit by
    bit.

    Cost:
        As many reads as a number has bits.
    """
    bits = np.dtype(values.dtype).itemsize * 8
    word = jnp.dtype(f"uint{bits}")
    keys, rank = jax.lax.bitcast_convert_type(values, word), values.size // 2

    # NaN's bits are above those of infinity, so that NaN comes last.
    def decide_bit(index, found):
        trial = found | (jnp.ones((), word) << jnp.asarray(bits - 1 - index, word))
        # Where at most `rank` keys are below a number, the entry of that rank is not.
        return jnp.where(jnp.sum(keys < trial, dtype=jnp.int32) <= rank, trial, found)

    found = jax.lax.fori_loop(0, bits, decide_bit, jnp.zeros((), word))
    return jax.lax.bitcast_convert_type(found, values.dtype)
