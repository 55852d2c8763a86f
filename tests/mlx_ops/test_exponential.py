import mlx.core as mx
import numpy as np
import pytest

from mlx_ops.exponential import SHORT, exp, softmax, swiglu

GRID = np.concatenate([np.linspace(-87.3, 0, 100_001), -np.logspace(-9, 0, 1000)]).astype(np.float32)


def test_exp_is_right_to_float32s_own_rounding():
    found = np.array(exp(mx.array(GRID), mx.array(0.0))).astype(np.float64)
    np.testing.assert_allclose(found, np.exp(GRID.astype(np.float64)), rtol=3e-7)


@pytest.mark.parametrize("size", [4, 2 * SHORT])
def test_what_is_masked_has_no_weight_at_all_and_the_top_has_1(size):
    x = mx.array(np.resize(np.array([-np.inf, 0.0, -1e30, -200.0], dtype=np.float32), size))
    assert np.array(exp(x, mx.array(0.0)))[:4].tolist() == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize("size", [4, 2 * SHORT])
def test_swiglu_is_right_for_gates_of_any_size(size):
    gate = np.resize(np.array([0, -1e-6, 3e4, 1e30, *np.linspace(-87, 87, 997)], np.float32), size)
    up = np.resize(np.linspace(-3, 3, 37).astype(np.float32), size)
    expected = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
    np.testing.assert_allclose(swiglu(mx.array(gate), mx.array(up)), expected, rtol=1e-6)
    assert np.abs(np.array(swiglu(mx.full(size, -1e5), mx.array(up)))).max() < 1e-30


@pytest.mark.parametrize("rows", [1, 400])
def test_softmax_is_mlxs(rows):
    x = mx.random.normal((rows, 3, 37), key=mx.random.key(0)) * 8
    x = mx.where(mx.arange(37) < 5, -mx.inf, x)
    np.testing.assert_allclose(np.array(softmax(x)), np.array(mx.softmax(x, axis=-1)), rtol=1e-5, atol=1e-9)


def test_half_precision_goes_to_mlx():
    x = mx.random.normal((64, 128), key=mx.random.key(1)).astype(mx.bfloat16)
    assert mx.array_equal(softmax(x), mx.softmax(x, axis=-1, precise=True))
