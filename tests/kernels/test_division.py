"""Division: the same bits from eager code, jit, vmap and NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantlab_kernels as qk

X = np.random.default_rng(0).normal(size=(64, 48)).astype(np.float32)
DIVISORS = {
  'row': np.abs(X).max(-1, keepdims=True),
  'column': np.abs(X).max(0, keepdims=True),
  'single': np.full((1, 1), 0.0123, np.float32),
  'scalar': np.float32(0.0123),
  'constant': 127.0,
}


@pytest.mark.parametrize('name', sorted(DIVISORS))
def test_equals_numpy_in_every_context(name):
  s = DIVISORS[name]
  want = X / np.float32(s) if np.ndim(s) == 0 else X / s
  np.testing.assert_array_equal(qk.divide(X, s), want)
  np.testing.assert_array_equal(jax.jit(qk.divide)(X, s), want)
  np.testing.assert_array_equal(jax.jit(lambda x: qk.divide(x, s))(X), want)
  if np.shape(s)[:1] in ((), (1,)):
    mapped = jax.jit(jax.vmap(lambda x: qk.divide(x[None], s)[0]))(X)
    np.testing.assert_array_equal(mapped, want)


def test_division_by_zero_nan_and_infinity_follow_ieee():
  x = np.array([1.0, -1.0, 0.0, np.nan, np.inf, np.inf], np.float32)
  s = np.array([0.0, 0.0, 0.0, 1.0, 2.0, np.inf], np.float32)
  with np.errstate(all='ignore'):
    np.testing.assert_array_equal(jax.jit(qk.divide)(x, s), x / s)


def test_gradients_are_those_of_a_quotient():
  gx, gs = jax.grad(lambda x, s: qk.divide(x, s).sum(), (0, 1))(
    jnp.float32([3.0, 4.0]), jnp.float32(2.0)
  )
  np.testing.assert_allclose(gx, [0.5, 0.5])
  np.testing.assert_allclose(gs, -7.0 / 4.0)


def test_keeps_the_dtype_of_x():
  assert qk.divide(jnp.ones(3, jnp.bfloat16), 3.0).dtype == jnp.bfloat16
