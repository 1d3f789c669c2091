"""w4a8_matmul: exact partial sums by group, in every width and layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from oracle import matmul as oracle
from oracle import packing

import quantlab_kernels as qk
from quantlab_kernels import int_dot
from quantlab_kernels.w4a8_matmul import xla


def _jit(op, *args, **options):
  """Runs op compiled: arrays are traced, the rest is static."""
  arrays = {k: v for k, v in options.items() if isinstance(v, np.ndarray)}
  static = {k: v for k, v in options.items() if k not in arrays}
  return jax.jit(lambda a, k: op(*a, **k, **static))(args, arrays)


def _x(shape, seed=0):
  return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def _w(shape, bits, signed=True, seed=1):
  """Returns (packed codes, their integers)."""
  q = np.random.default_rng(seed).integers(0, 2**bits, shape).astype(np.uint8)
  value = oracle.signed_value(q, bits) if signed else q.astype(np.int64)
  return packing.pack(q, bits), value


def _powers(shape, seed=2):
  """Scales that are powers of two: float32 sums of them stay exact here."""
  return 2.0 ** np.random.default_rng(seed).integers(-3, 4, shape)


@pytest.fixture(params=['loop', 'batched', 'reference'])
def implementation(request, monkeypatch):
  """The two routes of the xla backend, and the reference."""
  if request.param == 'reference':
    return 'reference'
  monkeypatch.setattr(int_dot, 'on_one_cpu', lambda: request.param == 'loop')
  return 'xla'


def _compiled(implementation, *cases):
  """Runs the cases (arrays, static options) in one compiled program."""

  def program(arrays):
    return [
      qk.w4a8_matmul(**a, **options, implementation=implementation)
      for a, (_, options) in zip(arrays, cases, strict=True)
    ]

  return jax.jit(program)([arrays for arrays, _ in cases])


def test_every_width_is_exact(implementation):
  cases, wants = [], []
  x, s = _x((5, 45)), _powers((3, 7))
  for bits in range(1, 9):
    for signed in (True, False):
      p, w = _w((45, 7), bits, signed)
      options = {'bits': bits, 'group': 16, 'signed': signed}
      cases.append(({'xq': x, 'packed': p, 'scale': s}, options))
      wants.append(oracle.grouped_product(x, w, s, 16))
  for got, want in zip(_compiled(implementation, *cases), wants, strict=True):
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('group', [None, 8, 32, 64, 100, 128])
def test_every_group_and_row_count_is_exact(group):
  k = 100
  p, w = _w((k, 9), 4)
  s = _powers((1 if group is None else -(-k // group), 9))
  xs = [_x((m, k)) for m in (1, 2, 3, 12, 13, 37)]
  cases = [({'xq': x, 'packed': p, 'scale': s}, {'group': group}) for x in xs]
  for got, x in zip(_compiled(None, *cases), xs, strict=True):
    np.testing.assert_array_equal(
      got, oracle.grouped_product(x, w, s, group or k)
    )


def test_zero_points_are_exact(implementation):
  rng = np.random.default_rng(4)
  cases, wants = [], []
  for m, bits, signed, x_zero in [
    (1, 4, False, None),
    (4, 4, True, 1),
    (1, 4, False, 3),
    (4, 4, False, 3),
    (4, 8, False, None),
    (1, 8, False, 3),
    (4, 8, True, 1),
  ]:
    x, s = _x((m, 45)), _powers((3, 7))
    p, w = _w((45, 7), bits, signed)
    low = -(2 ** (bits - 1)) if signed else 0
    z = rng.integers(low, low + 2**bits, (3, 7))
    zx = None if x_zero is None else rng.integers(-128, 128, (m, x_zero))
    arrays = {'xq': x, 'packed': p, 'scale': s, 'zero_point': z, 'x_zero': zx}
    cases.append((arrays, {'bits': bits, 'group': 16, 'signed': signed}))
    zx = 0 if zx is None else zx
    wants.append(oracle.grouped_product(x, w, s, 16, z, 1.0, zx))
  for got, want in zip(_compiled(implementation, *cases), wants, strict=True):
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('fill', [(-128, 0x8), (-128, 0x7), (127, 0x8)])
def test_extremes_are_exact(fill, implementation):
  x = np.full((3, 1024), fill[0], np.int8)
  q = np.full((1024, 5), fill[1], np.uint8)
  got = _jit(
    qk.w4a8_matmul,
    x,
    packing.pack(q, 4),
    np.ones((8, 5)),
    group=128,
    implementation=implementation,
  )
  want = oracle.int_product(x, oracle.signed_value(q, 4))
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('by_group', [False, True])
def test_real_scales(by_group, implementation):
  rng = np.random.default_rng(5)
  x = _x((2, 3, 70))
  p, w = _w((70, 6), 4)
  s = rng.normal(size=(3, 6)).astype(np.float32)
  sx = rng.uniform(0.1, 2, (2, 3, 3 if by_group else 1)).astype(np.float32)
  got = _jit(
    qk.w4a8_matmul, x, p, s, group=32, x_scale=sx, implementation=implementation
  )
  want = oracle.grouped_product(
    x.reshape(6, 70), w, s, 32, x_scale=sx.reshape(6, -1)
  )
  np.testing.assert_allclose(
    got.reshape(6, 6), want, rtol=1e-6, atol=1e-6 * np.abs(want).max()
  )


def test_a_block_of_columns_may_share_a_scale():
  x = _x((2, 16))
  p, w = _w((16, 6), 4)
  s = _powers((2, 3))
  want = oracle.grouped_product(x, w, np.repeat(s, 2, 1), 8)
  np.testing.assert_array_equal(_jit(qk.w4a8_matmul, x, p, s, group=8), want)


def test_experts_and_transforms():
  x = _x((3, 2, 20))
  parts = [_w((20, 5), 3, seed=i) for i in range(3)]
  p = np.stack([p for p, _ in parts])
  s = _powers((3, 3, 5))
  want = np.stack(
    [oracle.grouped_product(x[i], w, s[i], 8) for i, (_, w) in enumerate(parts)]
  )
  f = lambda x, p, s: qk.w4a8_matmul(x, p, s, bits=3, group=8)  # noqa: E731
  np.testing.assert_array_equal(f(x, p, s), want)
  np.testing.assert_array_equal(jax.jit(jax.vmap(f))(x, p, s), want)
  _, scanned = jax.lax.scan(lambda c, t: (c, f(*t)), 0, (x, p, s))
  np.testing.assert_array_equal(scanned, want)


def test_scales_have_gradients():
  x = _x((3, 20))
  p, w = _w((20, 5), 4)
  f = lambda s: qk.w4a8_matmul(x, p, s, group=8).sum()  # noqa: E731
  got = jax.jit(jax.grad(f))(jnp.ones((3, 5)))
  want = [
    oracle.int_product(x[:, g : g + 8], w[g : g + 8]).sum(0)
    for g in range(0, 20, 8)
  ]
  np.testing.assert_allclose(got, want)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_scales_that_are_not_finite_are_not_hidden(bad, implementation):
  x = _x((3, 20))
  x[1] = 0
  p, _ = _w((20, 5), 4)
  s = np.ones((3, 5), np.float32)
  s[1, 2] = bad
  sx = np.float32([[1], [1], [bad]])
  y = np.asarray(
    _jit(
      qk.w4a8_matmul,
      x,
      p,
      s,
      group=8,
      x_scale=sx,
      implementation=implementation,
    )
  )
  assert not np.isfinite(y[:, 2]).any()
  assert not np.isfinite(y[2]).any()
  assert np.isfinite(np.delete(y[:2], 2, 1)).all()


@pytest.mark.parametrize(('m', 'k', 'n'), [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_empty_axes_are_valid(m, k, n, implementation):
  p = np.zeros((qk.packed_rows(k, 4), n), np.uint8)
  y = _jit(
    qk.w4a8_matmul,
    *(_x((m, k)), p, np.ones((1, n))),
    zero_point=np.ones((1, n), int),
    implementation=implementation,
  )
  np.testing.assert_array_equal(y, np.zeros((m, n)))


def test_errors_say_what_was_expected():
  x = _x((3, 20))
  p, _ = _w((20, 5), 4)
  s = np.ones((3, 5))
  with pytest.raises(TypeError, match='packed must be uint8, found int8'):
    qk.w4a8_matmul(x, p.view(np.int8), s, group=8)
  with pytest.raises(ValueError, match='9 rows, expected 10 for K=20'):
    qk.w4a8_matmul(x, p[:9], s, group=8)
  with pytest.raises(ValueError, match=r'scale has shape \(3, 5\)'):
    qk.w4a8_matmul(x, p, s, group=4)
  for group in (0, 8.0):
    with pytest.raises(ValueError, match=f'{group=} must be a positive int'):
      qk.w4a8_matmul(x, p, s, group=group)
  with pytest.raises(ValueError, match='1 to 8 bits'):
    qk.w4a8_matmul(x, p, s, bits=9)
  with pytest.raises(TypeError, match='zero_point must be an integer'):
    qk.w4a8_matmul(x, p, s, group=8, zero_point=s)
  with pytest.raises(TypeError, match='returns floats'):
    qk.w4a8_matmul(x, p, s, group=8, out_dtype=jnp.int32)


@pytest.mark.parametrize('many', [False, True])
def test_groups_within_shard_map(many, monkeypatch):
  """A loop over groups on every device, and its derivative."""
  monkeypatch.setattr(xla, '_batched', lambda *sizes: many)
  mesh = Mesh(np.array(jax.devices()[:1]), ('d',))
  x, p = _x((3, 64)), _x((32, 24), seed=1).view(np.uint8)
  scale = np.ones((4, 24), np.float32)

  def slope(x, p, scale):
    def loss(s):
      y = qk.w4a8_matmul(x, p, s, group=16, implementation='xla')
      return jnp.sum(y**2)

    return jax.grad(loss)(scale)

  columns = P(None, 'd')
  run = jax.shard_map(
    slope, mesh=mesh, in_specs=(P(), columns, columns), out_specs=columns
  )
  np.testing.assert_allclose(
    jax.jit(run)(x, p, scale), slope(x, p, scale), rtol=1e-6
  )
