"""The block formats: MX by the OCP rules, NVFP4, exponent rules."""

import ml_dtypes
import numpy as np
import pytest

from quantlab import core
from quantlab.core import presets

N = 6


def weights(seed, k):
  """Normal numbers with a zero column, a zero block and an outlier."""
  w = np.random.default_rng(seed).normal(size=(k, N)).astype(np.float32)
  w[:, 1] = 0
  w[:32, 2] = 0
  w[0, 0] *= 30
  return w


@pytest.mark.parametrize(
  ('q', 'element', 'block', 'emax'),
  [
    (presets.mxfp8(), 'fp8_e4m3', 32, 8),
    (presets.mxfp8(element='e5m2'), 'fp8_e5m2', 32, 15),
    (presets.mxfp6(), 'fp6_e2m3', 32, 2),
    (presets.mxfp6(element='e3m2'), 'fp6_e3m2', 32, 4),
    (presets.mxfp4(), 'fp4_e2m1', 32, 2),
  ],
  ids=repr,
)
def test_microscaling(q, element, block, emax):
  """The OCP rule, through the casts of ml_dtypes."""
  w = weights(3, k=64)
  params, fake = core.fit(w, q), core.fake_quantize(w, q)
  blocks = w.reshape(-1, block, w.shape[1])
  amax = np.abs(blocks).max(1)
  e = np.frexp(amax)[1] - 1 - emax
  x = np.ldexp(np.float32(1), np.where(amax > 0, e, -126))
  np.testing.assert_array_equal(params.scale, x)
  dtype = {
    'fp8_e4m3': ml_dtypes.float8_e4m3fn,
    'fp8_e5m2': ml_dtypes.float8_e5m2,
    'fp6_e2m3': ml_dtypes.float6_e2m3fn,
    'fp6_e3m2': ml_dtypes.float6_e3m2fn,
    'fp4_e2m1': ml_dtypes.float4_e2m1fn,
  }[element]
  top = float(ml_dtypes.finfo(dtype).max)
  y = np.clip(blocks / x[:, None], -top, top).astype(dtype).astype(np.float32)
  np.testing.assert_array_equal(fake, (y * x[:, None]).reshape(w.shape))


def test_mxint8():
  """Elements are codes times 2^-6, the stored exponent is the OCP one."""
  w = weights(4, k=64)
  q = presets.mxint8()
  blocks = w.reshape(2, 32, N)
  amax = np.abs(blocks).max(1)
  x = np.ldexp(np.float32(1), np.frexp(amax)[1] - 1)
  y = np.clip(np.round(blocks / np.where(amax > 0, x, 1)[:, None] * 64),
              -127, 127)  # fmt: skip
  want = y / 64 * x[:, None]
  np.testing.assert_array_equal(core.fake_quantize(w, q), want.reshape(w.shape))
  stored = core.quantize(w, q, core.Layout.of(w.shape, (0,)))
  used = amax > 0
  np.testing.assert_array_equal(
    np.asarray(stored.scale)[used], np.frexp(amax)[1][used] - 1 + 127
  )
  np.testing.assert_array_equal(stored.dequantize(), want.reshape(w.shape))


def test_nvfp4():
  """F4 with the casts of ml_dtypes; 1/6 is a float32 factor."""
  w = weights(5, k=64)
  q = presets.nvfp4()
  params, fake = core.fit(w, q), core.fake_quantize(w, q)
  blocks = w.reshape(4, 16, N)
  amax = np.abs(blocks).max(1)
  g = np.abs(w).max() * (np.float32(1) / np.float32(448 * 6))
  s = amax * (np.float32(1) / np.float32(6)) * (np.float32(1) / g)
  s = np.clip(s, 0, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
  np.testing.assert_array_equal(params.scale, s)
  np.testing.assert_array_equal(params.scale2, [[g]])
  d = (s * g)[:, None]
  y = np.where(d > 0, blocks * (1 / np.where(d > 0, d, 1)), 0)
  y = np.clip(y, -6, 6).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
  np.testing.assert_array_equal(fake, (y * d).reshape(w.shape))
  assert (s == 0).any()  # the zero column


@pytest.mark.parametrize('rule', ['floor', 'ceil', 'nearest'])
def test_exponent_rules(rule):
  """floor may clip, ceil never does and is the smallest that does not."""
  q = presets.mxfp4(exponent=rule)
  w = np.abs(weights(6, k=64)) + np.float32(1e-3)
  scale = np.asarray(core.fit(w, q).scale)
  amax = w.reshape(2, 32, N).max(1)
  assert (np.frexp(scale)[0] == 0.5).all()
  if rule == 'ceil':
    assert (amax <= 6 * scale).all()
    assert (amax > 6 * scale / 2).all()
  elif rule == 'floor':
    assert (amax >= 4 * scale).all()
    assert (amax < 8 * scale).all()
  else:
    assert (np.abs(np.log2(amax / 6 / scale)) <= 0.5 + 1e-6).all()
