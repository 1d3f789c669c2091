"""Every format against the oracle: every code, and the contract of Format."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from oracle import formats as oracle

from quantlab import formats

# Learned codebooks have no values of their own: see test_codebook.
NAMES = [n for n in formats.names() if not n.startswith('codebook')]
SMALL = [n for n in NAMES if formats.get(n).bits <= 8]


def _samples(fmt, n=6_000, seed=0):
  """Values around and beyond the range, with exact ties and zeros."""
  rng = np.random.default_rng(seed)
  scale = fmt.max * np.exp2(rng.uniform(-12, 1, n))
  x = (rng.choice([-1, 1], n) * scale).astype(np.float32)
  v = fmt.values if fmt.bits <= 8 else np.arange(-300, 300, dtype=np.float32)
  ties = ((v[1:].astype(np.float64) + v[:-1]) / 2).astype(np.float32)
  near = [np.nextafter(ties, np.float32(s * np.inf)) for s in (-1, 1)]
  x = np.concatenate([x, v, ties, *near, np.float32([0, 1e30, -1e30])])
  return x[(x == 0) | (np.abs(x) >= 2.0**-126)]  # XLA flushes subnormals


@functools.cache
def run(name):
  """(x, round(x), codes of x, values of those codes, round(round(x)))."""
  fmt = formats.get(name)
  x = _samples(fmt)

  @jax.jit
  def f(x):
    rounded, codes = fmt.round(x), fmt.encode(x)
    return rounded, codes, fmt.decode(codes), fmt.round(rounded)

  return x, *map(np.asarray, f(x))


@pytest.mark.parametrize('name', SMALL)
def test_decode_every_code(name):
  fmt, table = formats.get(name), oracle.table(name)
  codes = np.arange(2**fmt.bits, dtype=np.uint8)
  got = np.asarray(jax.jit(fmt.decode)(codes))
  used = ~np.isnan(table)
  np.testing.assert_array_equal(got[used], table[used].astype(np.float32))
  np.testing.assert_array_equal(np.signbit(got[used]), np.signbit(table[used]))
  assert got.dtype == np.float32
  if name in oracle.DTYPES:
    assert np.isnan(got[~used]).all()


@pytest.mark.parametrize('name', SMALL)
def test_encode_is_nearest(name):
  fmt = formats.get(name)
  x, _, got, _, _ = run(name)
  want = oracle.nearest(name, np.clip(x, fmt.min, fmt.max))
  table = oracle.table(name)
  np.testing.assert_array_equal(table[got], table[want])
  differ = got != want
  # Only the sign of a zero may differ between codes of one value.
  assert (table[got[differ]] == 0).all()


@pytest.mark.parametrize('name', NAMES)
def test_round_trip_is_bit_exact(name):
  fmt = formats.get(name)
  _, rounded, codes, decoded, again = run(name)
  np.testing.assert_array_equal(
    rounded.view(np.uint32), decoded.view(np.uint32)
  )
  np.testing.assert_array_equal(again, rounded)
  assert rounded.dtype == np.float32
  assert codes.dtype == fmt.code_dtype
  assert codes.max() < 2**fmt.bits


@pytest.mark.parametrize('name', NAMES)
def test_bounds_nan_and_infinity(name):
  fmt = formats.get(name)
  x = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 3e38, -3e38, 0.0])
  got = np.asarray(jax.jit(fmt.round)(x))
  assert np.isnan(got[0])
  np.testing.assert_array_equal(got[1:5], [fmt.max, fmt.min] * 2)
  assert (got[5] == 0) == fmt.has_zero
  if name in ('fp8_e4m3', 'fp8_e5m2'):
    assert np.isnan(fmt.decode(fmt.encode(x))[0])


@pytest.mark.parametrize('name', SMALL)
def test_values_are_the_finite_values(name):
  fmt, table = formats.get(name), oracle.table(name)
  want = np.unique(table[np.isfinite(table)]).astype(np.float32)
  np.testing.assert_array_equal(fmt.values, want)
  assert (fmt.min, fmt.max) == (want[0], want[-1])
  assert fmt.signed == (want[0] < 0)
  assert fmt.has_zero == (0 in want)
  integers = ('int', 'uint', 'odd', 'ternary', 'binary')
  assert fmt.is_integer == name.startswith(integers)
  assert 2.0**fmt.emax <= fmt.max < 2.0 ** (fmt.emax + 1)


def test_values_inside_a_trace():
  jax.jit(lambda x: x + formats.get('int3').values.max())(1.0)


@pytest.mark.parametrize('name', sorted(oracle.DTYPES))
def test_minifloat_agrees_with_the_dtype_cast(name):
  """A million values; the cast is right once they are clipped (ptq.md F2)."""
  fmt, dtype = formats.get(name), oracle.DTYPES[name]
  rng = np.random.default_rng(2)
  n = 1_000_000
  x = rng.normal(size=n) * fmt.max * np.exp2(rng.integers(-20, 1, n))
  x = x.astype(np.float32)
  want = np.clip(x, fmt.min, fmt.max).astype(dtype)
  got = np.asarray(jax.jit(fmt.round)(x))
  np.testing.assert_array_equal(got, want.astype(np.float32))
  codes = np.asarray(jax.jit(fmt.encode)(x))
  np.testing.assert_array_equal(codes, want.view(np.uint8))
  assert fmt.max == oracle.MAXIMA[name] == float(ml_dtypes.finfo(dtype).max)


def test_e4m3_saturates_where_the_cast_gives_nan():
  fmt = formats.get('fp8_e4m3')
  x = np.float32([448, 464, 465, 1e9])
  assert np.isnan(
    x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)[2:]
  ).all()
  np.testing.assert_array_equal(fmt.round(x), np.float32([448] * 4))
  np.testing.assert_array_equal(fmt.encode(x), np.uint8([0x7E] * 4))


def test_int16_on_samples():
  fmt = formats.get('int16')
  rng = np.random.default_rng(3)
  x = (rng.normal(size=50_000) * 20_000).astype(np.float32)
  want = np.clip(np.round(x), -32768, 32767)
  np.testing.assert_array_equal(fmt.round(x), want)
  codes = np.asarray(fmt.encode(x))
  np.testing.assert_array_equal(codes, want.astype(np.int16).view(np.uint16))
  np.testing.assert_array_equal(fmt.decode(codes), want)
  with pytest.raises(ValueError, match='too many values'):
    _ = fmt.values


@pytest.mark.parametrize('name', SMALL)
def test_to_int8(name):
  fmt = formats.get(name)
  codes = np.arange(2**fmt.bits, dtype=np.uint8)
  if not fmt.is_integer:
    with pytest.raises(TypeError, match='not an integer format'):
      fmt.to_int8(codes)
  elif name == 'uint8':
    with pytest.raises(TypeError, match='does not fit int8'):
      fmt.to_int8(codes)
  else:
    got, want = np.asarray(fmt.to_int8(jnp.asarray(codes))), oracle.table(name)
    used = ~np.isnan(want)
    assert got.dtype == np.int8
    np.testing.assert_array_equal(got[used], want[used])


def test_narrow_leaves_the_lowest_code_unused():
  fmt = formats.Integer('int4', 4, narrow=True)
  assert (fmt.min, fmt.max) == (-7, 7)
  np.testing.assert_array_equal(fmt.round(jnp.float32([-8, 8])), [-7, 7])


@pytest.mark.parametrize(
  'name',
  [
    'int4',
    'int16',
    'uint8',
    'fp8_e4m3',
    'fp4_e2m1',
    'nf4',
    'pow2_4',
    'binary',
    'odd_3',
  ],
)
def test_stochastic_rounding_is_unbiased(name):
  fmt = formats.get(name)
  n = 2048
  rng = np.random.default_rng(4)
  if fmt.bits <= 8:
    v = fmt.values
    at = rng.integers(0, len(v) - 1, 64)
    low, high = v[at], v[at + 1]
  else:
    low = rng.integers(-30000, 30000, 64).astype(np.float32)
    high = low + 1
  t = rng.uniform(0, 1, 64).astype(np.float32)
  x = low + (high - low) * t
  key, many = jax.random.key(0), np.tile(x, (n, 1))
  got = np.asarray(jax.jit(fmt.stochastic_round)(key, many))
  assert ((got == low) | (got == high)).all()
  # Five standard deviations of the mean of n Bernoulli numbers.
  bound = 5 * (high - low) * 0.5 / np.sqrt(n)
  assert (np.abs(got.mean(0, dtype=np.float64) - x) < bound).all()
  exact = fmt.stochastic_round(key, jnp.asarray(low))
  np.testing.assert_array_equal(exact, low)
  wild = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf])
  out = np.asarray(fmt.stochastic_round(key, wild))
  assert np.isnan(out[0])
  assert tuple(out[1:]) == (fmt.max, fmt.min)


def test_unknown_format_suggests():
  with pytest.raises(ValueError, match=r"unknown format 'int44'.*'int4'"):
    formats.get('int44')
  with pytest.raises(ValueError, match="did you mean 'fp8_e4m3'"):
    formats.get('fp8_e4m3fn')
  with pytest.raises(ValueError, match=r'known are .*nf4'):
    formats.get('%%')


def test_register_refuses_a_second_meaning():
  assert formats.register(formats.get('int4')) is formats.get('int4')
  with pytest.raises(ValueError, match='another format is registered'):
    formats.register(formats.Integer('int4', 5))


@pytest.mark.parametrize(
  ('make', 'bits'),
  [
    (formats.pow2, 1),
    (formats.pow2, 8),
    (formats.codebook, 0),
    (formats.codebook, 9),
  ],
)
def test_bits_out_of_range(make, bits):
  with pytest.raises(ValueError, match=f'found bits={bits}'):
    make(bits)
