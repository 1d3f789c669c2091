"""Rotations by factors: against whole matrices in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import quantlab_kernels as qk

BACKENDS = ['reference', 'xla']


def _x(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize('implementation', BACKENDS)
@pytest.mark.parametrize('k', [1, 2, 3, 12, 64, 128, 192, 1024])
def test_walsh_hadamard_of_the_power_of_two(k, implementation):
  n = k & -k
  x = _x(5, k)
  want = x.reshape(5, -1, n).astype(float) @ scipy.linalg.hadamard(n) / n**0.5
  got = qk.hadamard(x, implementation=implementation)
  np.testing.assert_allclose(got, want.reshape(5, k), atol=4e-6)
  again = qk.hadamard(got, implementation=implementation)
  np.testing.assert_allclose(again, x, atol=8e-6)  # its own inverse


@pytest.mark.parametrize('implementation', BACKENDS)
def test_any_factors(implementation):
  factors = [_x(n, n, seed=n) for n in (2, 3, 5)]
  x = _x(2, 3, 60, seed=1)
  whole = functools.reduce(np.kron, [f.astype(float) for f in factors])
  want = (x.reshape(2, 3, 2, 30) @ whole).reshape(2, 3, 60)
  got = qk.hadamard(x, factors, implementation=implementation)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_quantized_rows_are_those_of_two_steps():
  x = _x(4, 96)
  x[1, 3] = 100
  found = qk.hadamard(x, bits=8, symmetric=False)
  for a, b in zip(
    found,
    qk.quantize_activation(qk.hadamard(x), bits=8, symmetric=False),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  # An outlier costs the others of its row less once it is spread.
  q, scale, _ = qk.hadamard(x, bits=4)
  back = qk.hadamard(q.astype(scale.dtype) * scale)
  plain, s, _ = qk.quantize_activation(x, bits=4)
  assert (
    np.abs(back - x)[1].mean()
    < 0.9 * np.abs(plain.astype(s.dtype) * s - x)[1].mean()
  )


def test_transformations():
  x = _x(3, 16)
  f = jax.jit(qk.hadamard)
  np.testing.assert_allclose(jax.vmap(f)(x), f(x), atol=1e-6)
  g = jax.grad(lambda x: (f(x) * x).sum())(jnp.asarray(x))
  np.testing.assert_allclose(g, 2 * f(x), atol=1e-5)  # it is symmetric
  assert f(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
  assert f(np.zeros((0, 8), np.float32)).shape == (0, 8)


def test_refused():
  with pytest.raises(TypeError, match='found int32'):
    qk.hadamard(jnp.ones((2, 4), jnp.int32))
  with pytest.raises(ValueError, match=r'square matrices, found .*\(2, 3'):
    qk.hadamard(_x(2, 6), [_x(2, 3)])
  with pytest.raises(ValueError, match=r'sizes \[4\] do not divide 6'):
    qk.hadamard(_x(2, 6), [np.eye(4)])
