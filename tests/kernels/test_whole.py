"""Derivatives of derivatives, where scans split their bodies."""

import hessians
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal

import quantlab_kernels as kernels
from quantlab_kernels import whole

X = normal(0, 4, 16)


@jax.custom_jvp
def rounded(x):
  return jnp.round(x)


rounded.defjvp(lambda at, along: (whole(rounded, *at), along[0]))


def step(x):
  return jnp.sin(rounded(3 * x))


def looped(step, x):
  return jax.lax.scan(lambda x, _: (step(x), None), x, None, length=3)[0]


WAYS = {
  'scan': lambda x: looped(step, x),
  'jit': lambda x: looped(jax.jit(step), x),
  'remat': lambda x: looped(jax.checkpoint(step), x),
  'remat outside': jax.checkpoint(lambda x: looped(step, x)),
  'scan in scan': lambda x: jax.lax.scan(
    lambda x, _: (looped(step, x), None), x, None, length=1
  )[0],
  'vmap': jax.vmap(lambda x: looped(step, x)),
  'vmap inside': lambda x: looped(jax.vmap(step), x),
  'unrolled': lambda x: step(step(step(x))),
}


def second(f, x):
  return hessians.products(lambda x: jnp.sum(jnp.cos(f(x))), x)


@pytest.mark.parametrize('jit', [False, True])
@pytest.mark.parametrize('name', WAYS)
def test_a_rule_holds_in_each_order_and_way(name, jit):
  """The derivatives of y = sin(x), three times, at the rounded points."""
  f = jax.jit(WAYS[name]) if jit else WAYS[name]
  shifts, y = [], X
  for _ in range(3):
    shifts.append(jnp.round(3 * y) - 3 * y)
    y = step(y)

  def shifted(x):  # to the same points, without rounding
    for shift in shifts:
      x = jnp.sin(3 * x + shift)
    return x

  [want, *_] = second(shifted, X)
  for got in second(f, X):
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


def test_integers_are_passed_and_do_not_vary():
  f = lambda x, n: (x * n.astype(x.dtype), n + 1)  # noqa: E731
  call = lambda x: whole(f, x, jnp.int32(2))  # noqa: E731
  y, n = jax.jit(call)(jnp.float32(3))
  assert (y, n) == (6.0, 3)
  assert jax.grad(lambda x: call(x)[0])(jnp.float32(3)) == 2.0
  _, (dy, dn) = jax.jvp(call, (jnp.float32(3),), (jnp.float32(1),))
  assert dy == 2.0
  assert dn.dtype == jax.dtypes.float0


CODES = jnp.arange(256).reshape(16, 16).astype(jnp.int8)
SCALE = jnp.full((1, 16), 0.05)


def by_codes(x, **use):
  w = kernels.pack((CODES & 15).view(jnp.uint8), 4)
  return kernels.w4a16_matmul(x, w, SCALE / 8, bits=4, **use)


def by_row_scales(x, **use):
  scales = {'x_scale': jnp.sin(x[:, :1]), 'w_scale': SCALE / 1e4}
  return x + kernels.int8_matmul(CODES[:4], CODES, **scales, **use)


def by_ranges(x, **use):
  _, scale, _ = kernels.quantize_activation(x, **use)
  return x * scale


def by_image_scales(x, **use):
  images = CODES.reshape(1, 4, 4, 16)
  y = kernels.int8_conv(
    images,
    CODES.reshape(1, 1, 16, 16),
    window_strides=(1, 1),
    padding='VALID',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    x_scale=jnp.sin(x[:1, :1]).reshape(1, 1, 1, 1),
    w_scale=SCALE / 1e4,
    **use,
  )
  return x + y[0, 0]


KERNELS = {
  'w4a16': by_codes,
  'int8': by_row_scales,
  'quantize': by_ranges,
  'conv': by_image_scales,
}


@pytest.mark.parametrize('name', KERNELS)
def test_kernels_in_a_scan(name, cpu_kernels):
  """As their definitions, whichever way it is differentiated."""
  del cpu_kernels
  f = KERNELS[name]
  fast = lambda x: jnp.sin(f(x, implementation='cpu'))  # noqa: E731
  plain = lambda x: jnp.sin(f(x, implementation='reference'))  # noqa: E731
  got = second(lambda x: looped(fast, x), X)
  [want, *_] = second(lambda x: plain(plain(plain(x))), X)
  assert np.any(want)
  for one in got:
    np.testing.assert_allclose(one, want, rtol=1e-3, atol=1e-4)
