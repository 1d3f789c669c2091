"""Every format through the front door: deployed = simulated, bytes exact.

One program holds a dense and a convolution weight for every quantizer, so that
it is compiled once.
"""

import jax
import numpy as np
import pytest
from draws import normal
from jax import lax
from oracle import snap

import quantlab as ql

K, N = 64, 8
MSE = ql.scales.mse(candidates=8)

# name: quantizer, bits of a code, groups, bytes of a scale, other bytes
QUANTIZERS = {
  **{f'int{b}': (getattr(ql, f'int{b}')(), b, 1, 4, 0) for b in range(2, 9)},
  **{
    f'uint{b}': (
      getattr(ql, f'uint{b}')(symmetric=False, group=16),
      b,
      4,
      4,
      4 * N,
    )
    for b in range(2, 9)
  },
  'int4 asymmetric': (ql.int4(symmetric=False, group=32), 4, 2, 4, 2 * N),
  'int4 mse': (ql.int4(group=16, scale=MSE), 4, 4, 4, 0),
  'int8 tensor': (ql.int8(per='tensor'), 8, 1, 4 / N, 0),
  'int4 block': (ql.int4(block=(16, 4)), 4, 4, 4 / 4, 0),
  'int4 ragged': (ql.int4(group=24, ragged=True), 4, 3, 4, 0),
  'int4 bfloat16': (ql.int4(group=16, scale_format='bfloat16'), 4, 4, 2, 0),
  'fp8_e4m3': (ql.fp8_e4m3(), 8, 1, 4, 0),
  'fp8_e5m2': (ql.fp8_e5m2(), 8, 1, 4, 0),
  'fp6_e3m2': (ql.fp6_e3m2(), 6, 1, 4, 0),
  'fp6_e2m3': (ql.fp6_e2m3(), 6, 1, 4, 0),
  'fp4_e2m1': (ql.fp4_e2m1(group=16), 4, 4, 4, 0),
  'nf4': (ql.nf4(), 4, 1, 4, 0),
  'ternary': (ql.ternary(), 2, 1, 4, 0),
  'binary': (ql.binary(), 1, 1, 4, 0),
  'odd': (ql.odd(bits=3), 3, 1, 4, 0),
  'pow2': (ql.pow2(bits=4), 4, 1, 4, 0),
  'codebook': (ql.codebook(bits=3), 3, 1, 4, 8 * N * 4),
  'mxfp8 e4m3': (ql.mxfp8(), 8, 2, 1, 0),
  'mxfp8 e5m2': (ql.mxfp8(element='e5m2'), 8, 2, 1, 0),
  'mxfp6 e2m3': (ql.mxfp6(), 6, 2, 1, 0),
  'mxfp6 e3m2': (ql.mxfp6(element='e3m2'), 6, 2, 1, 0),
  'mxfp4': (ql.mxfp4(), 4, 2, 1, 0),
  'mxint8': (ql.mxint8(), 8, 2, 1, 0),
  'nvfp4': (ql.nvfp4(), 4, 4, 1, 4),
  'dfp16': (ql.dfp16(), 16, 1, 1 / N, 0),
}
# Relative errors of a normal weight, far enough to tell a broken format.
LIMITS = {1: 0.7, 2: 0.8, 3: 0.4, 4: 0.3}


def apply(params, x):
  image = x.reshape(-1, 2, 2, 16)
  numbers = ('NHWC', 'HWIO', 'NHWC')
  return {
    name: (
      x @ p['dense'],
      lax.conv_general_dilated(
        image, p['conv'], (1, 1), 'VALID', dimension_numbers=numbers
      ),
    )
    for name, p in params.items()
  }


@jax.jit
def decoded(weights):
  """All of them, in one program."""
  return {
    name: {k: q.dequantize() for k, q in each.items()}
    for name, each in weights.items()
  }


@pytest.fixture(scope='module')
def results():
  dense = normal(0, K, N)
  weights = {'dense': dense, 'conv': dense.reshape(2, 2, 16, N)}
  params = dict.fromkeys(QUANTIZERS, weights)
  rules = {f'^/{name}/': found[0] for name, found in QUANTIZERS.items()}
  x = normal(1, 4, K)
  model = ql.ptq(apply, params, rules, [x])
  simulated = ql.fake_quantized(apply, model.plan)
  deployed = model.apply(model.params, x)
  w_hats = decoded(model.params['weights'])
  return model, deployed, simulated(params, x), w_hats, (dense, x)


@pytest.mark.parametrize('name', QUANTIZERS)
def test_format(results, name):
  model, deployed, simulated, w_hats, (w, x) = results
  quantizer, bits, groups, scale_bytes, more = QUANTIZERS[name]
  dense, conv = (model.params['weights'][name][k] for k in ('dense', 'conv'))
  for q in (dense, conv):
    assert q.quantizer == quantizer
    assert q.nbytes == K * N * bits // 8 + groups * N * scale_bytes + more
    assert q.bits_per_weight == 8 * q.nbytes / w.size
  w_hat = np.asarray(w_hats[name]['dense'])
  np.testing.assert_array_equal(w_hats[name]['conv'].reshape(K, N), w_hat)
  for got, sim in zip(deployed[name], simulated[name], strict=True):
    want = (x @ w_hat).reshape(got.shape)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(got, sim, rtol=1e-5, atol=2e-5)
  error = np.linalg.norm(w_hat - w) / np.linalg.norm(w)
  assert 0 < error < LIMITS.get(bits, 0.1)


def test_every_factory_is_here():
  factories = {
    name
    for name in ql.__all__
    if callable(getattr(ql, name))
    and isinstance(getattr(getattr(ql, name), '__module__', None), str)
    and getattr(ql, name).__module__ == 'quantlab.core.presets'
  }
  assert factories == {name.split()[0] for name in QUANTIZERS}


@pytest.mark.parametrize('per', ['channel', 'tensor'])
def test_binary_weights_with_integer_inputs(per):
  """Codes without a zero are no two's complement."""
  params, x = {'w': normal(0, 8, 6)}, normal(1, 4, 8)
  rule = ql.rule(weight=ql.binary(per=per), input=ql.int8(per='token'))
  model = ql.ptq(lambda p, x: x @ p['w'], params, {'w': rule}, [x])
  axes = 0 if per == 'channel' else None
  magnitude = np.mean(np.abs(params['w']), axis=axes, keepdims=True)
  w = np.where(params['w'] >= 0, magnitude, -magnitude)
  x_hat = snap.symmetric(x, 1)
  np.testing.assert_allclose(
    model.apply(model.params, x), x_hat @ w, rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize('scale_format', ['bfloat16', 'pow2', 'e8m0', 'e4m3'])
@pytest.mark.parametrize('units', [{'group': 8}, {'per': 'channel'}])
def test_integer_products_use_every_level_of_the_scale(scale_format, units):
  """E4M3 scales stand under a float32 one, which belongs to them."""
  w, x = {'w': normal(0, 32, 12)}, normal(1, 5, 32)
  weight = ql.int4(scale_format=scale_format, **units)
  rule = ql.rule(weight=weight, input=ql.int8(per='token'))

  def apply(p, x):
    return x @ p['w']

  model = ql.ptq(apply, w, {'': rule}, [x])
  assert model.plan.sites['w'].compute == 'int8'
  want = ql.fake_quantized(apply, model.plan)(w, x)
  got = model.apply(model.params, x)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
