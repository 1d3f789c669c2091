"""Scales in their storage formats."""

import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from quantlab.core import scale_formats

SPANS = np.concatenate(
  [
    np.float32(2.0) ** np.arange(-120, 121, 7, dtype=np.float32),
    np.random.default_rng(0).lognormal(0, 20, 400).astype(np.float32),
    np.float32([6, 12, 7, 14, 3.5, 448, 0.75, 127, 254]),
  ]
)


@pytest.mark.parametrize('levels', [1.0, 6.0, 7.0, 127.0, 448.0])
@pytest.mark.parametrize('rule', ['floor', 'ceil', 'nearest'])
def test_power_of_two(levels, rule):
  f = jax.jit(lambda s: scale_formats.of_range(s, levels, 'pow2', rule))
  got = np.asarray(f(SPANS)).astype(np.float64)
  ratio = SPANS.astype(np.float64) / levels
  log = np.log2(ratio)
  if rule == 'floor':
    want = np.floor(np.log2(SPANS.astype(np.float64))) - math.floor(
      math.log2(levels)
    )
  else:
    want = {'ceil': np.ceil, 'nearest': np.round}[rule](log)
  far = np.abs(log - np.round(log)) > 1e-9  # not where log2 itself may err
  want = np.where(far | (rule == 'nearest'), want, np.round(log))
  if rule == 'floor':
    want = np.frexp(SPANS)[1] - math.frexp(levels)[1]
  np.testing.assert_array_equal(got, 2.0 ** np.clip(want, -126, 127))


@pytest.mark.parametrize('rule', ['floor', 'ceil', 'nearest'])
@pytest.mark.parametrize('name', ['float32', 'pow2', 'bfloat16'])
def test_traced_levels_give_the_same_scales(name, rule):
  for levels in (1.0, 3.0, 7.0, 127.0, 32767.0):
    still = scale_formats.of_range(SPANS, levels, name, rule)
    traced = jax.jit(lambda s, v: scale_formats.of_range(s, v, name, rule))(
      SPANS, jnp.float32(levels)
    )
    np.testing.assert_array_equal(still, traced)


def test_bfloat16_survives_jit():
  """XLA drops a pair of casts as excess precision; the rounding must stay."""
  f = jax.jit(lambda s: scale_formats.of_range(s, 1.0, 'bfloat16', 'ceil'))
  want = SPANS.astype(ml_dtypes.bfloat16).astype(np.float32)
  np.testing.assert_array_equal(f(SPANS), want)


@pytest.mark.parametrize('name', scale_formats.NAMES)
def test_storage_is_lossless(name):
  second = scale_formats.second_level(SPANS[None], 6.0)[0, 0]
  s = scale_formats.of_range(SPANS, 6.0, name, 'ceil', second)
  stored = scale_formats.store(s, name)
  assert stored.dtype == scale_formats.storage_dtype(name)
  np.testing.assert_array_equal(scale_formats.load(stored, name), s)


def test_all_codes_of_exponents():
  e = np.arange(-126, 128)
  s = scale_formats.load(jnp.asarray(e, jnp.int8), 'pow2')
  np.testing.assert_array_equal(s, 2.0**e)
  np.testing.assert_array_equal(scale_formats.store(s, 'pow2'), e)
  codes = scale_formats.store(s, 'e8m0')
  np.testing.assert_array_equal(codes, e + 127)
  want = np.asarray(codes).view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
  np.testing.assert_array_equal(scale_formats.load(codes, 'e8m0'), want)


def test_all_positive_e4m3_codes():
  codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
  s = scale_formats.load(jnp.asarray(codes), 'e4m3')
  back = np.asarray(scale_formats.store(s, 'e4m3'))
  np.testing.assert_array_equal(back.view(np.uint8), codes.view(np.uint8))


def test_e4m3_needs_its_second_level():
  with pytest.raises(ValueError, match='need scale2'):
    scale_formats.of_range(SPANS, 6.0, 'e4m3', 'ceil')


def test_zero_spans():
  zero = jnp.zeros((2, 3))
  for name, want in (
    ('float32', 2.0**-126),
    ('bfloat16', 2.0**-126),
    ('pow2', 2.0**-126),
    ('e8m0', 2.0**-126),
    ('e4m3', 0),
  ):
    second = scale_formats.second_level(zero, 6.0)
    np.testing.assert_array_equal(second, [[1]])
    s = scale_formats.of_range(zero, 6.0, name, 'floor', second)
    np.testing.assert_array_equal(s, np.full((2, 3), want, np.float32))


def test_scales_are_normal_numbers():
  """A subnormal scale would be flushed to zero, and its inverse infinite."""
  tiny = np.float32([2.0**-126, 1e-37])
  for name, levels in itertools.product(('float32', 'bfloat16'), (7.0, 448.0)):
    s = scale_formats.of_range(tiny, levels, name, 'ceil')
    assert (np.asarray(s) >= 2.0**-126).all()
    assert np.isfinite(1 / np.asarray(s)).all()
