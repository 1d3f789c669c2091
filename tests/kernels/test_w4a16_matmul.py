"""w4a16_matmul: the float product with any decoded weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import matmul as oracle
from oracle import packing

import quantlab_kernels as qk
from quantlab_kernels import int_dot

TABLE = np.linspace(-1, 1, 16, dtype=np.float32) ** 3


@pytest.fixture(params=['whole', 'slices', 'reference'])
def implementation(request, monkeypatch):
  """The two routes of the xla backend, and the reference."""
  if request.param == 'reference':
    return 'reference'
  monkeypatch.setattr(int_dot, 'on_one_cpu', lambda: request.param == 'slices')
  monkeypatch.setattr(int_dot, 'SLICE_BEYOND', 0)
  return 'xla'


def _jit(op, *args, **options):
  """Runs op compiled: arrays are traced, the rest is static."""
  arrays = {k: v for k, v in options.items() if isinstance(v, np.ndarray)}
  static = {k: v for k, v in options.items() if k not in arrays}
  return jax.jit(lambda a, k: op(*a, **k, **static))(args, arrays)


def _normal(shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _codes(shape, bits, seed=1):
  q = np.random.default_rng(seed).integers(0, 2**bits, shape)
  return q.astype(np.uint16 if bits == 16 else np.uint8)


def _close(got, want, x, w_hat, rtol=1e-6):
  """Within rtol of the sum of the magnitudes of the terms."""
  size = np.abs(np.float64(x)) @ np.abs(w_hat)
  assert np.all(np.abs(np.float64(got) - want) <= rtol * size + 1e-30)


def _compiled(implementation, *cases):
  """Runs the cases (arrays, static options) in one compiled program."""

  def program(arrays):
    return [
      qk.w4a16_matmul(**a, **options, implementation=implementation)
      for a, (_, options) in zip(arrays, cases, strict=True)
    ]

  return jax.jit(program)([arrays for arrays, _ in cases])


@pytest.mark.parametrize('signed', [True, False])
def test_integer_codes(signed, implementation):
  cases, w_hats = [], []
  x, s, z = _normal((3, 300)), _normal((5, 7), 2), _normal((5, 7), 3)
  for bits in (1, 2, 3, 4, 8, 16):
    q = _codes((300, 7), bits)
    v = oracle.signed_value(q, bits) if signed else q
    w_hats.append(oracle.dequantize(v, s, 64, z))
    arrays = {'x': x, 'w': packing.pack(q, bits), 'scale': s, 'zero_point': z}
    cases.append((arrays, {'bits': bits, 'group': 64, 'signed': signed}))
  for got, w_hat in zip(_compiled(implementation, *cases), w_hats, strict=True):
    _close(got, np.float64(x) @ w_hat, x, w_hat)


@pytest.mark.parametrize('m', [1, 13])
def test_every_group(m, implementation):
  k = 1300
  cases, w_hats = [], []
  x, q = _normal((m, k)), _codes((k, 5), 4)
  v, p = oracle.signed_value(q, 4), packing.pack(q, 4)
  for group in (None, 8, 100, 256, 1024, 2000):
    s = _normal((1 if group is None else -(-k // group), 5), 2)
    w_hats.append(oracle.dequantize(v, s, group or k))
    options = {'bits': 4, 'group': group}
    cases.append(({'x': x, 'w': p, 'scale': s}, options))
  for got, w_hat in zip(_compiled(implementation, *cases), w_hats, strict=True):
    _close(got, np.float64(x) @ w_hat, x, w_hat)


def test_integer_valued_operands_are_exact(implementation):
  rng = np.random.default_rng(3)
  x = rng.integers(-128, 128, (2, 1300)).astype(np.float32)
  q = _codes((1300, 5), 4)
  got = _jit(
    qk.w4a16_matmul,
    x,
    packing.pack(q, 4),
    bits=4,
    implementation=implementation,
  )
  np.testing.assert_array_equal(
    got, oracle.int_product(x, oracle.signed_value(q, 4))
  )


def test_any_decode(implementation):
  x, q = _normal((3, 700)), _codes((700, 7), 4)
  s = np.abs(_normal((11, 7), 2))
  w_hat = oracle.dequantize(TABLE[q], s, 64)
  got = _jit(
    qk.w4a16_matmul,
    *(x, packing.pack(q, 4), s),
    bits=4,
    group=64,
    decode=lambda q: jnp.asarray(TABLE)[q],
    implementation=implementation,
  )
  _close(got, np.float64(x) @ w_hat, x, w_hat)


@pytest.mark.parametrize('scaled', [False, True])
def test_decoded_weights(scaled, implementation):
  x, w = _normal((2, 3, 300)), _normal((300, 7), 1)
  s = _normal((1, 7), 2) if scaled else None
  w_hat = np.float64(w) if s is None else oracle.dequantize(w, s, 300)
  got = _jit(qk.w4a16_matmul, x, w, s, implementation=implementation)
  assert got.shape == (2, 3, 7)
  _close(got, np.float64(x) @ w_hat, x, w_hat)


@pytest.mark.parametrize('m', [1, 3])
def test_sums_of_16_bit_floats_are_float32(m):
  # The sum 2 - 2^-8 takes nine bits: bfloat16 keeps eight.
  x = jnp.ones((m, 256), jnp.bfloat16)
  w = jnp.full((256, 2), 2.0**-8, jnp.bfloat16).at[0].set(1.0)
  y = _jit(qk.w4a16_matmul, x, w, out_dtype=jnp.float32)
  np.testing.assert_array_equal(y, np.full((m, 2), 2 - 2.0**-8))
  assert _jit(qk.w4a16_matmul, x, w).dtype == jnp.bfloat16
  q = np.full((256, 2), 1, np.uint8)
  y = _jit(
    qk.w4a16_matmul, x, packing.pack(q, 4), bits=4, out_dtype=jnp.float32
  )
  np.testing.assert_array_equal(y, np.full((m, 2), 256.0))


def test_experts_and_transforms(implementation):
  x, q = _normal((3, 2, 300)), _codes((3, 300, 5), 4)
  s = _normal((3, 5, 5), 2)
  p = packing.pack(q, 4)

  def f(x, p, s):
    return qk.w4a16_matmul(
      x, p, s, bits=4, group=64, implementation=implementation
    )

  @jax.jit
  def program(*args):
    scanned = jax.lax.scan(lambda c, t: (c, f(*t)), 0, args)[1]
    return f(*args), jax.vmap(f)(*args), scanned

  v = oracle.signed_value(q, 4)
  w_hat = [oracle.dequantize(v[i], s[i], 64) for i in range(3)]
  want = np.float64(x) @ np.stack(w_hat)
  for got in program(x, p, s):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_gradients_reach_x_and_scale(implementation):
  x, q, s = _normal((3, 300)), _codes((300, 5), 4), _normal((5, 5), 2)

  def f(x, s):
    return qk.w4a16_matmul(
      x, packing.pack(q, 4), s, bits=4, group=64, implementation=implementation
    ).sum()

  gx, gs = jax.jit(jax.grad(f, (0, 1)))(x, s)
  v = oracle.signed_value(q, 4)
  w_hat = oracle.dequantize(v, s, 64)
  np.testing.assert_allclose(
    gx, np.tile(w_hat.sum(1), (3, 1)), rtol=1e-4, atol=1e-4
  )
  want = [
    (np.float64(x).sum(0)[g : g + 64, None] * v[g : g + 64]).sum(0)
    for g in range(0, 300, 64)
  ]
  np.testing.assert_allclose(gs, want, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(bad, implementation):
  x, q = np.abs(_normal((3, 300))), _codes((300, 5), 4)
  s = np.ones((5, 5), np.float32)
  s[1, 2] = bad
  x[2, 7] = bad
  y = np.asarray(
    _jit(
      qk.w4a16_matmul,
      x,
      packing.pack(q, 4),
      s,
      bits=4,
      group=64,
      implementation=implementation,
    )
  )
  assert not np.isfinite(y[:, 2]).any()
  assert not np.isfinite(y[2, q[7] != 0]).any()
  assert np.isfinite(np.delete(y[:2], 2, 1)).all()


@pytest.mark.parametrize(('m', 'k', 'n'), [(0, 4, 3), (2, 0, 3), (2, 4, 0)])
def test_empty_axes_are_valid(m, k, n, implementation):
  p = np.zeros((qk.packed_rows(k, 4), n), np.uint8)
  y = _jit(
    qk.w4a16_matmul,
    *(_normal((m, k)), p, np.ones((1, n))),
    bits=4,
    implementation=implementation,
  )
  np.testing.assert_array_equal(y, np.zeros((m, n)))


def test_errors_say_what_was_expected():
  x, q = _normal((3, 20)), _codes((20, 5), 4)
  with pytest.raises(TypeError, match='x must be floating, found int8'):
    qk.w4a16_matmul(x.astype(np.int8), x.T)
  with pytest.raises(TypeError, match='or uint8 with bits='):
    qk.w4a16_matmul(x, q)
  with pytest.raises(ValueError, match='decode reads codes'):
    qk.w4a16_matmul(x, x.T, decode=lambda q: q)
  with pytest.raises(ValueError, match='expected K=20 rows'):
    qk.w4a16_matmul(x, x)
  with pytest.raises(ValueError, match='20 packed rows, expected 10'):
    qk.w4a16_matmul(x, q, bits=4)
