"""The C++ products under jit, grad, vmap, scan, remat and shard_map."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import quantlab_kernels as qk
from quantlab_kernels import int_dot

pytestmark = pytest.mark.usefixtures('cpu_kernels')
M, K, N, G, B = 3, 40, 9, 16, 4
T = np.float32([1, 2, 3])


def _rng(*seed):
  return np.random.default_rng(seed)


def _codes(*shape, seed=0):
  return _rng(seed).integers(-128, 128, shape).astype(np.int8)


def _scales(*shape, seed=1):
  return _rng(seed).uniform(0.5, 2, shape).astype(np.float32)


def _product(x, p, scale, x_scale, x_zero, *, name='cpu'):
  return qk.w4a8_matmul(
    x,
    p,
    scale,
    group=G,
    x_scale=x_scale,
    x_zero=x_zero,
    implementation=name,
  )


SIZES = ((M, K), (K // 2, N), (-(-K // G), N), (M, 1), (M, 1))


def _operands(mapped=()):
  """Operands of `_product`; those named have an axis of B in front."""
  makers = (
    _codes,
    lambda *s: _codes(*s, seed=2).view(np.uint8),
    _scales,
    lambda *s: _scales(*s, seed=3),
    lambda *s: _codes(*s, seed=4).astype(np.int32),
  )
  return [
    make(*((B,) if i in mapped else ()), *size)
    for i, (make, size) in enumerate(zip(makers, SIZES, strict=True))
  ]


@pytest.mark.parametrize(
  'mapped', [(0,), (3,), (0, 3, 4), (1,), (2,), (0, 1), (0, 1, 2, 3, 4)]
)
def test_vmap_of_any_operands(mapped):
  args = _operands(mapped)
  axes = [0 if i in mapped else None for i in range(5)]
  got = jax.jit(jax.vmap(_product, axes))(*args)
  slow = functools.partial(_product, name='reference')
  want = jax.vmap(slow, axes)(*args)
  np.testing.assert_allclose(got, want, 1e-6, 1e-6 * np.abs(want).max())


def test_vmap_folds_rows_where_the_weight_is_shared():
  args = _operands((0, 3, 4))
  f = jax.vmap(_product, (0, None, None, 0, 0))
  text = str(jax.make_jaxpr(f)(*args))
  assert f'i8[1,{B * M},{K}]' in text
  mapped = jax.vmap(_product, (None, 0, None, None, None))
  assert f'i8[1,{M},{K}]' in str(jax.make_jaxpr(mapped)(*_operands((1,))))


def test_vmap_over_nothing():
  x, w = np.zeros((0, 3, 64), np.int8), _codes(64, 12)
  y = jax.vmap(lambda a: qk.int8_matmul(a, w, implementation='cpu'))(x)
  assert y.shape == (0, 3, 12)


def test_vmap_of_vmap():
  x, p, s, sx, zx = _operands((0, 1))

  def both(f):
    rows = jax.vmap(f, (0, None, None, None, None))
    return jax.vmap(rows, (None, 0, None, None, None))(x, p, s, sx, zx)

  got = both(_product)
  assert got.shape == (B, B, M, N)
  want = both(functools.partial(_product, name='reference'))
  np.testing.assert_allclose(got, want, 1e-6, 1e-6 * np.abs(want).max())


@pytest.mark.parametrize('by_group', [False, True])
def test_gradients_of_the_scales(by_group):
  x, p, s, sx, zx = _operands()
  if by_group:
    sx = _scales(M, s.shape[0])
  c = _scales(M, N, seed=7)

  def loss(s, sx, name):
    return (c * _product(x, p, s, sx, zx, name=name)).sum()

  for wrt in ((0,), (1,), (0, 1)):
    got = jax.jit(jax.grad(loss, wrt), static_argnums=2)(s, sx, 'cpu')
    want = jax.jit(jax.grad(loss, wrt), static_argnums=2)(s, sx, 'reference')
    for g, w in zip(got, want, strict=True):
      np.testing.assert_allclose(g, w, 1e-5, 1e-5 * np.abs(w).max())
  tangents = (np.ones_like(s), np.ones_like(sx))
  for name in ('cpu', 'reference'):
    f = functools.partial(loss, name=name)
    _, d = jax.jvp(f, (s, sx), tangents)
    if name == 'cpu':
      first = d
  np.testing.assert_allclose(first, d, 1e-5)


def test_second_derivatives_and_gradients_of_a_batch():
  x, p, s, sx, zx = _operands()

  def loss(t, name):
    return _product(x, p, s * t * t, sx, zx, name=name).sum()

  for f in (
    jax.jacfwd(jax.grad(loss)),
    lambda t, name: jax.vmap(jax.grad(loss), (0, None))(t * T, name),
  ):
    run = jax.jit(f, static_argnums=1)
    np.testing.assert_allclose(run(1.5, 'cpu'), run(1.5, 'reference'), 1e-5)


def test_codes_carry_no_gradient():
  x, p, s, sx, zx = _operands()
  g = jax.grad(lambda x: _product(x, p, s, sx, zx).sum(), allow_int=True)(x)
  assert g.dtype == jax.dtypes.float0


def test_scan_and_remat():
  x, p, s, sx, zx = _operands((0, 1, 2))

  @jax.checkpoint
  def step(carry, args):
    y = _product(*args[:3], sx, zx)
    return carry + y.mean(), y

  total, ys = jax.jit(lambda a: jax.lax.scan(step, 0.0, a))((x, p, s))
  want = [
    _product(x[i], p[i], s[i], sx, zx, name='reference') for i in range(B)
  ]
  np.testing.assert_allclose(ys, want, 1e-6, 1e-6 * np.abs(want).max())
  np.testing.assert_allclose(total, np.mean(want, (1, 2)).sum(), 1e-5)
  grad = jax.grad(lambda s: jax.lax.scan(step, 0.0, (x, p, s))[0])(s)
  assert np.isfinite(grad).all()
  assert np.abs(grad).min() > 0


def test_int32_sums_and_experts():
  x, w = _codes(B, M, K), _codes(B, K, N, seed=5)
  got = jax.jit(
    lambda x, w: qk.int8_matmul(x, w, out_dtype=jnp.int32, implementation='cpu')
  )(x, w)
  np.testing.assert_array_equal(got, np.matmul(x.astype(int), w.astype(int)))


def test_tables_of_experts():
  x, p = _codes(B, M, K), _codes(B, K // 2, N, seed=5).view(np.uint8)
  table, s = _codes(B, 16, seed=6), _scales(B, 1, N)

  def run(name):
    f = lambda s: qk.lut_matmul(  # noqa: E731
      x, p, table, s, implementation=name
    )
    y, back = jax.vjp(f, s)
    return y, *back(y)

  for got, want in zip(run('cpu'), run('reference'), strict=True):
    np.testing.assert_allclose(got, want, 1e-5, 1e-5 * np.abs(want).max())


@pytest.mark.parametrize('check', [False, True])
def test_shard_map(check, monkeypatch):
  """Rows, columns, and K with a sum of the parts: on each device its own."""
  monkeypatch.setattr(int_dot, 'on_one_cpu', lambda: False)
  if jax.device_count() < 4:
    pytest.skip('one device')
  mesh = Mesh(np.array(jax.devices()[:4]), ('d',))
  x, w = _codes(8, 64), _codes(64, 12, seed=5)
  want = x.astype(np.int64) @ w

  def local(x, w):
    return qk.int8_matmul(x, w, implementation='cpu')

  def summed(x, w):
    return jax.lax.psum(local(x, w), 'd')

  for f, specs, out in [
    (local, (P('d'), P()), P('d')),
    (local, (P(), P(None, 'd')), P(None, 'd')),
    (summed, (P(None, 'd'), P('d')), P()),
  ]:
    run = jax.shard_map(
      f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=check
    )
    np.testing.assert_array_equal(jax.jit(run)(x, w), want)
