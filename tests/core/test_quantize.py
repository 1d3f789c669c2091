"""Codes and numbers of every kind of quantizer against the NumPy oracle."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import quantize as oracle

from quantlab import core, formats
from quantlab.core import presets, scales

FORMATS = [
  'int2', 'int3', 'int4', 'int8', 'uint2', 'uint4', 'uint8',
  'fp8_e4m3', 'fp8_e5m2', 'fp6_e3m2', 'fp6_e2m3', 'fp4_e2m1',
  'nf4', 'pow2_4', 'ternary', 'binary', 'odd_3',
]  # fmt: skip
GRANULARITIES = [
  {'per': 'channel'},
  {'per': 'tensor'},
  {'group': 4},
  {'group': 8, 'ragged': True},
  {'block': (4, 3)},
  {'block': (8, 4), 'ragged': True},
]
K, N = 20, 6


def weights(seed=0, k=K, n=N, scale=1.0):
  """Normal numbers with a zero column, a zero unit and an outlier."""
  w = np.random.default_rng(seed).normal(size=(k, n)).astype(np.float32)
  w[:, 1] = 0
  w[:4, 2] = 0
  w[0, 0] *= 30
  return w * np.float32(scale)


@functools.partial(jax.jit, static_argnames=('q', 'axis'))
def everything(w, q, axis=-2):
  """Parameters, simulation, codes and decoded codes of one quantizer."""
  params = core.fit(w, q, axis=axis)
  codes = core.encode(w, q, params, axis=axis)
  decoded = core.decode(codes, q, params, axis=axis)
  return params, core.fake_quantize(w, q, axis=axis), codes, decoded


def same_bits(a, b):
  a, b = np.asarray(a), np.asarray(b)
  assert a.dtype == b.dtype == np.float32
  np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def against_oracle(w, q):
  """Checks one quantizer with an absmax or minmax range on w (K, N)."""
  params, fake, codes, decoded = everything(w, q)
  same_bits(fake, decoded)
  units = {'per': q.per, 'group': q.group, 'block': q.block}
  s, z, g = oracle.fit(
    w, q.format.name, symmetric=q.symmetric, narrow=q.narrow,
    scale_format=q.scale_format, exponent=q.exponent, **units,
  )  # fmt: skip
  if q.format is formats.BINARY:
    s = np.where(np.asarray(params.scale) == oracle.TINY, oracle.TINY, s)
  same_bits(params.scale, s)
  if z is not None:
    same_bits(params.zero_point, z)
  if g is not None:
    same_bits(params.scale2, np.full((1, 1), g))
  want = oracle.codes_of(w, q.format.name, s, z, g, q.narrow, **units)
  values = oracle.values_of(want, q.format.name, s, z, g, **units)
  np.testing.assert_array_equal(decoded, values)
  # Codes may differ in the sign of a zero alone.
  differ = np.asarray(codes) != want
  assert (values[differ] == 0).all()
  if q.format.has_zero:
    assert not np.asarray(fake)[w == 0].any()
  return fake


@pytest.mark.parametrize(
  ('name', 'granularity'),
  [(n, g) for n in FORMATS for g in GRANULARITIES[2:4]]
  + [(n, g) for n in ('int4', 'binary') for g in GRANULARITIES[:2]]
  + [(n, g) for n in ('int4', 'nf4') for g in GRANULARITIES[4:]],
  ids=str,
)
def test_symmetric(name, granularity):
  q = core.Quantizer(name, scale=scales.absmax(), **granularity)
  against_oracle(weights(), q)


@pytest.mark.parametrize('granularity', GRANULARITIES, ids=str)
@pytest.mark.parametrize('name', ['int3', 'uint4'])
def test_asymmetric(name, granularity):
  q = core.Quantizer(name, symmetric=False, **granularity)
  w = np.abs(weights()) - np.float32(0.3)
  w[:, 1] = 0
  against_oracle(w, q)


@st.composite
def quantizers(draw):
  """Any quantizer with a range the oracle knows."""
  name = draw(st.sampled_from(FORMATS))
  integer = name.startswith(('int', 'uint'))
  symmetric = not integer or draw(st.booleans())
  return core.Quantizer(
    name,
    symmetric=symmetric,
    narrow=name.startswith('int') and symmetric and draw(st.booleans()),
    scale=scales.absmax() if symmetric else scales.minmax(),
    scale_format=draw(
      st.sampled_from(['float32', 'bfloat16', 'pow2', 'e8m0', 'e4m3'])
    ),
    exponent=draw(st.sampled_from(['floor', 'ceil', 'nearest'])),
    **draw(st.sampled_from(GRANULARITIES)),
  )


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(quantizers(), st.integers(0, 2**30), st.integers(-60, 60))
def test_any_quantizer(q, seed, exponent):
  against_oracle(weights(seed, scale=2.0**exponent), q)


@pytest.mark.parametrize(
  'q',
  [
    presets.int8(per='token'),
    presets.int4(group=5, symmetric=False),
    presets.int4(group=8, ragged=True),
    presets.int8(per='tensor'),
    presets.int8(block=(5, 3)),
    presets.codebook(bits=3),
    presets.nvfp4(group=4),
  ],
  ids=repr,
)
def test_activations_are_weights_transposed(q):
  w = weights(7)
  params, fake, codes, decoded = everything(w, q)
  t_params, t_fake, t_codes, t_decoded = everything(w.T, q, axis=-1)
  for a, b in zip(params, t_params, strict=True):
    if a is not None:
      np.testing.assert_array_equal(a, np.swapaxes(b, -2, -1))
  np.testing.assert_array_equal(fake, t_fake.T)
  np.testing.assert_array_equal(codes, t_codes.T)
  same_bits(t_fake, t_decoded)
  same_bits(fake, decoded)


@pytest.mark.parametrize(
  'q',
  [
    presets.int4(group=4, symmetric=False),
    presets.int8(per='head'),
    presets.nvfp4(group=4),
    presets.codebook(bits=2),
    presets.int4(group=8, ragged=True, scale=scales.mse(candidates=5)),
  ],
  ids=repr,
)
def test_loops_are_separate_tensors(q):
  w = np.stack([weights(i, scale=10.0**i) for i in range(3)])
  params, fake, codes, _ = everything(w, q)
  for i in range(3):
    one = everything(w[i], q)
    np.testing.assert_array_equal(fake[i], one[1])
    np.testing.assert_array_equal(codes[i], one[2])
    for a, b in zip(params, one[0], strict=True):
      if a is not None:
        np.testing.assert_allclose(a[i], b, rtol=1e-6)


@pytest.mark.parametrize('q', [
  presets.int4(), presets.int4(symmetric=False), presets.uint4(symmetric=False),
  presets.int8(group=4), presets.int3(scale=scales.mse(candidates=9)),
], ids=repr)  # fmt: skip
def test_error_is_at_most_half_a_step_in_range(q):
  w = weights(8)
  params, fake, _, _ = everything(w, q)
  rows = K // params.scale.shape[0]
  step = np.repeat(np.asarray(params.scale), rows, axis=0)
  z = params.zero_point
  z = 0 if z is None else np.repeat(np.asarray(z), rows, axis=0)
  lo, hi = (q.format.min - z) * step, (q.format.max - z) * step
  error = np.abs(fake - w)
  inside = (w >= lo) & (w <= hi)
  slack = 1 + 1e-5  # the product by 1/s may round the other way at a tie
  assert (error[inside] <= step[inside] / 2 * slack).all()
  assert inside.mean() > 0.9
  # What lies outside goes to the end of the range.
  ends = np.where(w > hi, hi, lo)
  np.testing.assert_allclose(fake[~inside], ends[~inside], rtol=1e-6)


@pytest.mark.parametrize('name', FORMATS)
def test_idempotent(name):
  q = core.Quantizer(name, group=4, scale=scales.absmax())
  w = weights(9)
  params = core.fit(w, q)
  once = core.fake_quantize(w, q, params)
  np.testing.assert_array_equal(core.fake_quantize(once, q, params), once)


@pytest.mark.parametrize('dtype', [jnp.float16, jnp.bfloat16])
def test_other_float_types_are_kept(dtype):
  w = jnp.asarray(weights(10), dtype)
  q = presets.int4(group=4)
  got = core.fake_quantize(w, q)
  assert got.dtype == dtype
  wide = core.fake_quantize(w.astype(jnp.float32), q)
  np.testing.assert_array_equal(got, wide.astype(dtype))


@pytest.mark.parametrize('dtype', [jnp.int32, jnp.bool_, jnp.complex64])
def test_other_types_are_refused(dtype):
  w = jnp.zeros((4, 4), dtype)
  q = presets.int4()
  for f in (core.fake_quantize, core.fit):
    with pytest.raises(TypeError, match=r'real floating-point.*found dtype'):
      f(w, q)
  with pytest.raises(TypeError, match='real floating-point'):
    core.encode(w, q, core.fit(jnp.ones((4, 4)), q))


@pytest.mark.parametrize('name', FORMATS)
def test_nan_stays_visible(name):
  w = weights(11)
  w[5, 3] = np.nan
  q = core.Quantizer(name, scale=scales.absmax())
  got = np.asarray(core.fake_quantize(w, q))
  assert np.isnan(got[5, 3])
  assert np.isfinite(np.delete(got, 3, axis=1)).all()
  given = core.fit(weights(11), q)
  got = np.asarray(core.fake_quantize(w, q, given))
  assert np.isnan(got).sum() == 1
  if name in ('fp8_e4m3', 'fp8_e5m2'):
    decoded = core.decode(core.encode(w, q, given), q, given)
    assert np.isnan(decoded[5, 3])


def test_infinity_saturates_under_given_parameters():
  w, q = weights(12), presets.int8()
  given = core.fit(w, q)
  w[3, 0], w[4, 0] = np.inf, -np.inf
  got = np.asarray(core.fake_quantize(w, q, given))
  s = float(given.scale[0, 0])
  np.testing.assert_allclose(got[3:5, 0], [127 * s, -128 * s], rtol=1e-6)


@pytest.mark.parametrize('q', [
  presets.int8(), presets.int4(symmetric=False), presets.nf4(group=5),
  presets.nvfp4(group=4), presets.mxfp4(group=4), presets.ternary(),
  presets.binary(), presets.codebook(bits=2), presets.dfp16(),
  presets.fp8_e4m3(per='tensor', scale_format='bfloat16'),
  presets.int4(scale=scales.mse(candidates=4)),
  presets.int4(scale=scales.percentile(p=99.0)),
], ids=repr)  # fmt: skip
def test_all_zero_is_all_zero(q):
  w = np.zeros((K, N), np.float32)
  params, fake, _, decoded = everything(w, q)
  np.testing.assert_allclose(fake, 0, atol=1e-37)
  np.testing.assert_array_equal(fake, decoded)
  assert np.isfinite(params.scale).all()
  if q.format.has_zero:
    assert not np.asarray(fake).any()


@pytest.mark.parametrize('scale', [1e-38, 1e-30, 1e30, 1e37])
@pytest.mark.parametrize('q', [
  presets.int8(), presets.int4(symmetric=False), presets.mxfp8(group=4),
  presets.nvfp4(group=4), presets.dfp16(), presets.ternary(),
], ids=repr)  # fmt: skip
def test_extreme_magnitudes_stay_finite(q, scale):
  w = np.random.default_rng(13).uniform(-1, 1, (K, N)).astype(np.float32)
  _, fake, _, decoded = everything(w * np.float32(scale), q)
  same_bits(fake, decoded)
  assert np.isfinite(fake).all()
  assert np.abs(fake).max() <= 2 * scale


@pytest.mark.parametrize('zero', [-1.0, 0.0, 3.0])
def test_ties_are_settled_before_the_zero_point(zero):
  """q = round(x / s) + z: with an odd z, round(x / s + z) would differ."""
  x = np.arange(-3, 3.5, 0.5, dtype=np.float32)[:, None]
  q = presets.int4(symmetric=False)
  given = core.QParams(np.float32([[1]]), np.float32([[zero]]))
  want = np.clip(np.round(x) + zero, -8, 7)
  codes = core.encode(x, q, given)
  np.testing.assert_array_equal(q.format.decode(codes), want)
  np.testing.assert_array_equal(core.decode(codes, q, given), want - zero)
  np.testing.assert_array_equal(core.fake_quantize(x, q, given), want - zero)


def test_unsigned_symmetric_covers_the_positive_part():
  x = np.float32([[-5.0, 0.0, 1.0, 15.0]]).T
  q = presets.uint4(per='channel')
  np.testing.assert_array_equal(core.fit(x, q).scale, [[1]])
  np.testing.assert_array_equal(core.fake_quantize(x, q), [[0], [0], [1], [15]])


def test_fit_range_equals_fit():
  w = weights(14)
  for q in (
    presets.int8(),
    presets.int8(symmetric=False),
    presets.uint8(symmetric=False),
    presets.int8(scale_format='pow2'),
    presets.nvfp4(group=None, per='channel'),
    presets.fp8_e4m3(),
  ):
    found = core.fit_range(w.min(0, keepdims=True), w.max(0, keepdims=True), q)
    for a, b in zip(found, core.fit(w, q), strict=True):
      if a is None:
        assert b is None
      else:
        np.testing.assert_array_equal(a, b)


def test_fit_range_includes_zero():
  q = presets.int8(symmetric=False)
  found = core.fit_range(np.float32([[2.0]]), np.float32([[3.0]]), q)
  np.testing.assert_allclose(found.scale, 3 / 255, rtol=1e-6)
  np.testing.assert_array_equal(found.zero_point, [[-128]])
  with pytest.raises(ValueError, match='learns a table'):
    core.fit_range(0.0, 1.0, presets.codebook())


def test_jit_and_eager_agree():
  w = weights(15)
  for q in (presets.int4(group=4, symmetric=False), presets.nvfp4(group=4)):
    eager = core.fake_quantize(w, q)
    fused = jax.jit(lambda w, q=q: core.fake_quantize(w * 1.0, q) + 0.0)(w)
    constant = jax.jit(lambda q=q: core.fake_quantize(w, q))()
    np.testing.assert_array_equal(eager, fused)
    np.testing.assert_array_equal(eager, constant)
    given = core.fit(w, q)
    closed = jax.jit(
      lambda w, q=q, given=given: core.fake_quantize(w, q, given)
    )(w)
    np.testing.assert_array_equal(eager, closed)


def test_empty_contraction_is_refused():
  with pytest.raises(ValueError, match='nothing to quantize'):
    core.fit(jnp.zeros((0, 3)), presets.int4())
  with pytest.raises(ValueError, match='second axis'):
    core.fit(jnp.zeros(3), presets.int4())
  with pytest.raises(ValueError, match='axis is -2 or -1'):
    core.fit(jnp.zeros((3, 3)), presets.int4(), axis=0)
  assert (
    core.fake_quantize(jnp.zeros((0, 3)), presets.int8(), axis=-1).size == 0
  )


def test_quantizer_is_enough_for_a_cache_hit():
  """Equal quantizers made twice compile once."""
  before = everything._cache_size()
  for _ in range(2):
    everything(weights(), presets.int5(group=10))
  everything(weights(), dataclasses.replace(presets.int5(), per=None, group=10))
  assert everything._cache_size() == before + 1
