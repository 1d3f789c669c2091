"""quantize_activation in C++ gives the bits of the definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantlab_kernels as qk

pytestmark = pytest.mark.usefixtures('cpu_kernels')


def _rows(seed):
  """Rows of every kind: sizes, zeros, ties, NaN, infinities, extremes."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(14, (1, 7, 16, 33, 100)[seed % 5])).astype(np.float32)
  x *= np.float32(10.0) ** rng.integers(-30, 30, (14, 1)).astype(np.float32)
  x[1] = 0
  x[2] = -np.abs(x[2])
  x[3] = np.float32(127) * rng.choice([-1, 1, 0.5], x[3].shape)
  x[3, 0] = 127  # the scale is 1: halves are ties
  for row, bad in ((4, np.nan), (5, np.inf), (6, -np.inf), (7, -0.0)):
    x[row, rng.integers(x.shape[1])] = bad
  x[8] = np.float32(3e38)
  x[9] = np.float32(2.0**-126)
  return x


def _same(got, want):
  for g, w in zip(got, want, strict=True):
    assert (g is None) == (w is None)
    if g is not None:
      np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize('symmetric', [True, False])
def test_every_kind_of_row(symmetric, isa):
  xs = [_rows(seed) for seed in range(5)]
  options = [
    {'bits': bits, 'symmetric': symmetric, 'narrow': bool(i % 2)}
    for i, bits in enumerate((8, 8, 4, 2, 7))
  ]

  def program(name):
    return jax.jit(
      lambda xs: [
        qk.quantize_activation(x, **o, implementation=name)
        for x, o in zip(xs, options, strict=True)
      ]
    )(xs)

  for got, want in zip(program('cpu'), program('reference'), strict=True):
    _same(got, want)


def test_given_scales(isa):
  x = _rows(4)
  s = np.random.default_rng(0).uniform(0.1, 2, (14, 1)).astype(np.float32)
  z = np.arange(14, dtype=np.int32)[:, None]
  for options in ({'scale': s}, {'scale': s, 'zero_point': z}):
    options['symmetric'] = 'zero_point' not in options
    got, want = (
      jax.jit(
        lambda x, o=options, n=name: qk.quantize_activation(
          x, **o, implementation=n
        )
      )(x)
      for name in ('cpu', 'reference')
    )
    _same(got, want)


def test_many_rows_and_half_precision():
  x = np.random.default_rng(0).normal(size=(3, 500, 300))
  for dtype in (jnp.float32, jnp.bfloat16):
    a = jnp.asarray(x, dtype)
    got = qk.quantize_activation(a, implementation='cpu')
    _same(got, qk.quantize_activation(a, implementation='reference'))


def test_vmap_and_gradients():
  x = np.random.default_rng(0).normal(size=(4, 3, 20)).astype(np.float32)

  def both(name):
    f = lambda x: qk.quantize_activation(x, implementation=name)  # noqa: E731
    grad = jax.grad(lambda x: (f(x)[1] ** 2).sum())
    return *jax.vmap(f)(x)[:2], jax.jit(grad)(x), jax.vmap(grad)(x)

  for got, want in zip(both('cpu'), both('reference'), strict=True):
    np.testing.assert_allclose(got, want, 1e-6)


def test_a_tensor_with_one_scale_goes_to_xla():
  x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
  (choice,) = qk.choices(qk.quantize_activation, x, per='tensor')
  assert 'each row by itself' in dict(choice.refusals)['cpu']
