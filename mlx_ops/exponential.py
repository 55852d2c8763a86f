"""exp where MLX has only the C library's, one number at a time: a sixth of a decode step of a small model on x86.

Elsewhere, and without a compiler, these are MLX's own functions. Left out: gradients and half precision.
"""

import platform

import mlx.core as mx

from mlx_ops.backend import prepare

LOWEST = -88.0
"""Here 2^-127 is what n says, which is 0 in a float's exponent; and so is the result. Above 88 there is no float."""
LOG2_E = 1.4426950408889634
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
"""Their sum is the natural logarithm of 2; products of the first with whole numbers up to 2^8 are exact."""
COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
"""Of the polynomial in Cephes's expf (S. L. Moshier), for numbers up to ln(2) / 2 from 0."""


NEAREST = 1.5 * 2.0**23 + 127
"""A float32 has no place for halves above this: adding it rounds, and leaves n + 127 in the lowest bits."""
SHORT = 2048
"""An array of fewer numbers takes longer to hand to so many operations than to exp."""


def exp(x: mx.array, top: mx.array) -> mx.array:
    """exp of x - top, which is at most 0; in float32 to 3e-7 relative, and 0 below -87.3."""
    return _compiled(x, top) if _pays(x) else mx.exp(x - top)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) times up (arXiv:2002.05202, equation 6), in float32."""
    if not _pays(gate):
        return gate * mx.sigmoid(gate) * up
    return gate * up / (1.0 + _vectorised(-mx.clip(gate, LOWEST, -LOWEST)))


def softmax(x: mx.array) -> mx.array:
    """softmax over the last axis, in float32."""
    if not _pays(x):
        return mx.softmax(x, axis=-1, precise=True)
    weights = exp(x, x.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def _pays(x: mx.array) -> bool:
    found = prepare()
    slow = found.kind == "cpu" and platform.machine() == "x86_64"
    return slow and found.compiles and x.dtype == mx.float32 and x.size >= SHORT


def _vectorised(x: mx.array) -> mx.array:
    """2^n times exp of the rest, with n written into a float's exponent: operations that g++ makes vectors of.

    Written for `mx.compile`, which fuses no more than 11 operations in a row: Estrin's scheme is 7 for the series.
    """
    rounded = x * LOG2_E + NEAREST
    power = mx.view(mx.view(rounded, mx.int32) << 23, mx.float32)
    n = rounded - NEAREST
    r = (x - n * LN2_HIGH) - n * LN2_LOW
    c, square = COEFFICIENTS, r * r
    series = ((c[5] + c[4] * r) + square * (c[3] + c[2] * r)) + (square * square) * (c[1] + c[0] * r)
    return (1.0 + r) * power + series * (square * power)


@mx.compile
def _compiled(x: mx.array, top: mx.array) -> mx.array:
    # The reshape keeps the broadcast out of the long loop: with strides of any kind g++ makes no vectors of it.
    return _vectorised(mx.maximum(x - top, LOWEST).reshape(-1)).reshape(x.shape)
