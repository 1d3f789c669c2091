"""int8_matmul: exact against int64, under every transform, in every layout."""

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import matmul as oracle

import quantlab_kernels as qk
from quantlab_kernels import int_dot
from quantlab_kernels.int8_matmul.specs import SPECS

BACKENDS = ['xla', 'reference']
ROWS = [1, 2, 3, 5, 12, 13, 37]
FILLS = {
  'random': lambda rng, s: rng.integers(-128, 128, s),
  'lowest': lambda rng, s: np.full(s, -128),
  'highest': lambda rng, s: np.full(s, 127),
  'opposite': lambda rng, s: rng.choice([-128, 127], s),
}


def _jit(op, *args, **options):
  """Runs op compiled: arrays are traced, the rest is static."""
  arrays = {k: v for k, v in options.items() if isinstance(v, np.ndarray)}
  static = {k: v for k, v in options.items() if k not in arrays}
  return jax.jit(lambda a, k: op(*a, **k, **static))(args, arrays)


def _codes(shape, seed=0, fill='random'):
  return FILLS[fill](np.random.default_rng(seed), shape).astype(np.int8)


@jax.jit
def _int32(x, w, x_zero=None, w_zero=None):
  return qk.int8_matmul(x, w, x_zero=x_zero, w_zero=w_zero, out_dtype=jnp.int32)


@pytest.mark.parametrize('implementation', BACKENDS)
@pytest.mark.parametrize(('k', 'n'), [(1, 1), (7, 5), (64, 1), (129, 33)])
def test_odd_shapes_are_exact(k, n, implementation):
  xs, w = [_codes((m, k), m) for m in ROWS], _codes((k, n), 1)

  @jax.jit
  def program(xs, w):
    kw = {'out_dtype': jnp.int32, 'implementation': implementation}
    return [qk.int8_matmul(x, w, **kw) for x in xs]

  for got, x in zip(program(xs, w), xs, strict=True):
    np.testing.assert_array_equal(got, oracle.int_product(x, w))


@pytest.mark.parametrize('m', [1, 3])
@pytest.mark.parametrize('fill', sorted(FILLS))
def test_extremes_are_exact(m, fill):
  x, w = _codes((m, 1500), 0, fill), _codes((1500, 9), 1, fill)
  zx, zw = np.full((m, 1), 127), np.full((1, 9), -128)
  np.testing.assert_array_equal(_int32(x, w), oracle.int_product(x, w))
  np.testing.assert_array_equal(
    _int32(x, w, x_zero=zx, w_zero=zw), oracle.int_product(x, w, zx, zw)
  )


@pytest.mark.parametrize('m', [1, 2, 13])
@pytest.mark.parametrize('zeros', ['x', 'w', 'both'])
@pytest.mark.parametrize('transpose_w', [False, True])
def test_zero_points_are_exact(m, zeros, transpose_w):
  rng = np.random.default_rng(3)
  x, w = _codes((m, 45)), _codes((45, 11), 1)
  zx = rng.integers(-128, 128, (m, 1)) if zeros != 'w' else None
  zw = rng.integers(-128, 128, (1, 11)) if zeros != 'x' else None
  want = oracle.int_product(
    x, w, 0 if zx is None else zx, 0 if zw is None else zw
  )
  for implementation in BACKENDS:
    got = _jit(
      qk.int8_matmul,
      x,
      w.T if transpose_w else w,
      x_zero=zx,
      w_zero=zw,
      transpose_w=transpose_w,
      out_dtype=jnp.int32,
      implementation=implementation,
    )
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('rows', [1, 16, 50, 64, 200])
@pytest.mark.parametrize('m', [1, 5])
def test_slices_of_k_are_exact(rows, m):
  x, w = _codes((m, 130)), _codes((130, 17), 1)
  np.testing.assert_array_equal(
    int_dot.int_dot(x, w, rows=rows), oracle.int_product(x, w)
  )


def test_slices_are_for_large_weights_on_one_cpu(monkeypatch):
  monkeypatch.setattr(int_dot, 'on_one_cpu', lambda: True)
  assert int_dot.slice_rows(1024, 1024) == 0
  assert int_dot.slice_rows(4096, 4096) == int_dot.SLICE
  assert int_dot.slice_rows(4096, 4096, transpose_w=True) == 0
  monkeypatch.setattr(int_dot, 'on_one_cpu', lambda: False)
  assert int_dot.slice_rows(4096, 4096) == 0


@pytest.mark.parametrize('name', sorted(n for n in SPECS if '_128' in n))
def test_shapes_of_real_models(name):
  m, k, n = SPECS[name]
  x, w = _codes((m, k)), _codes((k, n), 1)
  np.testing.assert_array_equal(_int32(x, w), oracle.int_product(x, w))


@hypothesis.settings(deadline=None, max_examples=40)
@hypothesis.given(
  x=hnp.arrays(np.int8, (3, 24)),
  w=hnp.arrays(np.int8, (24, 4)),
  x_zero=hnp.arrays(np.int32, (3, 1), elements=st.integers(-128, 127)),
  w_zero=hnp.arrays(np.int32, (1, 4), elements=st.integers(-128, 127)),
)
def test_any_codes_and_zero_points(x, w, x_zero, w_zero):
  np.testing.assert_array_equal(
    _int32(x, w, x_zero=x_zero, w_zero=w_zero),
    oracle.int_product(x, w, x_zero, w_zero),
  )


@pytest.mark.parametrize('implementation', BACKENDS)
def test_scales_rows_and_columns(implementation):
  rng = np.random.default_rng(5)
  x, w = _codes((2, 3, 40)), _codes((40, 6), 1)
  sx = rng.uniform(0.1, 2, (2, 3, 1)).astype(np.float32)
  sw = rng.uniform(0.1, 2, (1, 6)).astype(np.float32)
  got = _jit(
    qk.int8_matmul, x, w, x_scale=sx, w_scale=sw, implementation=implementation
  )
  want = oracle.int_product(x, w) * sx.astype(np.float64) * sw
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=3e-7)
  half = _jit(
    qk.int8_matmul,
    x,
    w,
    x_scale=0.5,
    w_scale=np.float32([[0.25]]),
    out_dtype=jnp.bfloat16,
  )
  assert half.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    half, (oracle.int_product(x, w) / 8).astype(jnp.bfloat16)
  )


def test_a_block_of_columns_may_share_a_scale():
  x, w = _codes((3, 8)), _codes((8, 6), 1)
  got = _jit(qk.int8_matmul, x, w, w_scale=np.float32([[1, 2, 4]]))
  want = oracle.int_product(x, w) * np.array([1, 1, 2, 2, 4, 4])
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('transpose_w', [False, True])
def test_leading_axes_of_the_weight_are_separate_products(transpose_w):
  rng = np.random.default_rng(6)
  x, w = _codes((2, 3, 5, 4, 20)), _codes((2, 3, 20, 7), 1)
  sx = rng.uniform(0.5, 2, (2, 3, 5, 4, 1)).astype(np.float32)
  sw = rng.uniform(0.5, 2, (2, 3, 1, 7)).astype(np.float32)
  zx = rng.integers(-9, 9, (2, 3, 1, 1, 1))
  got = _jit(
    qk.int8_matmul,
    x,
    np.swapaxes(w, -1, -2) if transpose_w else w,
    x_scale=sx,
    w_scale=sw,
    x_zero=zx,
    transpose_w=transpose_w,
  )
  want = oracle.int_product(x, w[:, :, None], zx) * sx * sw[:, :, None]
  assert got.shape == (2, 3, 5, 4, 7)
  np.testing.assert_allclose(got, want, rtol=3e-7, atol=1e-4)


def test_a_single_vector_is_one_row():
  x, w = _codes((20,)), _codes((20, 3), 1)
  got = _jit(qk.int8_matmul, x, w, out_dtype=jnp.int32)
  np.testing.assert_array_equal(got, oracle.int_product(x, w))


def test_under_vmap_and_scan():
  x, w = _codes((4, 1, 30)), _codes((4, 30, 5), 1)
  want = oracle.int_product(x, w)
  f = lambda x, w: qk.int8_matmul(x, w, out_dtype=jnp.int32)  # noqa: E731
  np.testing.assert_array_equal(jax.jit(jax.vmap(f))(x, w), want)
  np.testing.assert_array_equal(
    jax.vmap(f, (0, None))(x, w[0]), oracle.int_product(x, w[0])
  )
  _, scanned = jax.lax.scan(lambda c, t: (c, f(*t)), 0, (x, w))
  np.testing.assert_array_equal(scanned, want)


def test_scales_have_gradients_and_codes_have_none():
  x, w = _codes((3, 30)), _codes((30, 5), 1)

  def loss(s, x):
    return qk.int8_matmul(x, w, x_scale=s, w_scale=0.5).sum()

  gs, gx = jax.grad(loss, (0, 1), allow_int=True)(jnp.ones((3, 1)), x)
  want = oracle.int_product(x, w).sum(1, keepdims=True) / 2
  np.testing.assert_allclose(gs, want, rtol=1e-6)
  assert gx.dtype == jax.dtypes.float0


@pytest.mark.parametrize('implementation', BACKENDS)
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_scales_that_are_not_finite_are_not_hidden(bad, implementation):
  x, w = _codes((3, 30)), _codes((30, 5), 1)
  x[0] = 0
  sx = np.float32([[bad], [1], [bad]])
  y = _jit(
    qk.int8_matmul, x, w, x_scale=sx, w_scale=0.5, implementation=implementation
  )
  y = np.asarray(y)
  assert not np.isfinite(y[[0, 2]]).any()
  np.testing.assert_array_equal(y[1], oracle.int_product(x[1], w) / 2)
  y = _jit(
    qk.int8_matmul,
    x,
    w,
    w_scale=np.float32([[1, bad, 1, 1, 1]]),
    implementation=implementation,
  )
  y = np.asarray(y)
  assert not np.isfinite(y[:, 1]).any()
  assert np.isfinite(y[:, [0, 2, 3, 4]]).all()


@pytest.mark.parametrize(
  ('m', 'k', 'n'), [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0)]
)
@pytest.mark.parametrize('implementation', BACKENDS)
def test_empty_axes_are_valid(m, k, n, implementation):
  y = _jit(
    qk.int8_matmul,
    _codes((m, k)),
    _codes((k, n)),
    x_scale=np.ones((m, 1), np.float32),
    x_zero=np.ones((m, 1), np.int32),
    w_zero=np.ones((1, n), np.int32),
    implementation=implementation,
  )
  np.testing.assert_array_equal(y, np.zeros((m, n)))


def test_errors_say_what_was_expected():
  x, w = _codes((3, 8)), _codes((8, 5))
  with pytest.raises(TypeError, match='xq must be int8, found uint8'):
    qk.int8_matmul(x.view(np.uint8), w)
  with pytest.raises(TypeError, match='wq must be int8, found float32'):
    qk.int8_matmul(x, w.astype(np.float32))
  with pytest.raises(ValueError, match=r"expected \('...', 8\)"):
    qk.int8_matmul(x[:, :7], w)
  with pytest.raises(ValueError, match='its leading axes'):
    qk.int8_matmul(np.stack([x] * 3), np.stack([w] * 2))
  with pytest.raises(ValueError, match=r'x_scale has shape \(2, 1\)'):
    qk.int8_matmul(x, w, x_scale=np.ones((2, 1)))
  with pytest.raises(ValueError, match=r'w_scale has shape \(1, 4\)'):
    qk.int8_matmul(x, w, w_scale=np.ones((1, 4)))
  with pytest.raises(TypeError, match='x_zero must be an integer'):
    qk.int8_matmul(x, w, x_zero=1.5)
  with pytest.raises(ValueError, match='give no scales'):
    qk.int8_matmul(x, w, x_scale=1.0, out_dtype=jnp.int32)
  with pytest.raises(TypeError, match='floating or int32'):
    qk.int8_matmul(x, w, out_dtype=jnp.int8)
  wide = jax.ShapeDtypeStruct((1, 140_000), jnp.int8)
  deep = jax.ShapeDtypeStruct((140_000, 1), jnp.int8)
  with pytest.raises(ValueError, match='at most 131071 terms'):
    jax.eval_shape(qk.int8_matmul, wide, deep)
