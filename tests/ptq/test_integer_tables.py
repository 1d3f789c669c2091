"""Small float weights by int8 activations run on integers, exactly."""

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import quantlab as ql
from quantlab import formats
from quantlab.ops import tables

K, N, M = 64, 24, 5
WEIGHTS = {
  'fp4 by channel': ql.fp4_e2m1(),
  'mxfp4': ql.mxfp4(),
  'nvfp4': ql.nvfp4(),
  'pow2 of 4 bits': ql.pow2(bits=4),
  'nf4': ql.nf4(),
}
SIMULATED = ('nf4',)


def _apply(params, x):
  image = x.reshape(-1, 2, 2, 16)
  return {
    name: (
      x @ p['dense'],
      lax.conv_general_dilated(
        *(image, p['conv'], (1, 1), 'VALID'),
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
      ),
    )
    for name, p in params.items()
  }


@pytest.fixture(scope='module')
def results():
  rng = np.random.default_rng(0)
  w = rng.standard_normal((K, N), np.float32)
  x = rng.standard_normal((M, K), np.float32)
  params = {
    name: {'dense': w, 'conv': w.reshape(2, 2, 16, N)} for name in WEIGHTS
  }
  activations = ql.int8(per='token')
  rules = {
    f'^/{name}/': ql.rule(weight=q, input=activations)
    for name, q in WEIGHTS.items()
  }
  model = ql.ptq(_apply, params, rules, [x])
  chosen = ql.kernels.choices(model.apply, model.params, x)
  return model, model.apply(model.params, x), x, chosen


@pytest.mark.parametrize('name', WEIGHTS)
def test_products_are_those_of_the_values(results, name):
  """Codes of x by NumPy, times decoded weights in float64."""
  model, found, x, _ = results
  x = x.astype(np.float64)
  scale = np.abs(x).max(1, keepdims=True) / 127
  w = np.asarray(model.params['weights'][name]['dense'].dequantize())
  want = np.round(x / scale) * scale @ w.astype(np.float64)
  dense, conv = found[name]
  size = np.abs(want).max()
  np.testing.assert_allclose(dense, want, rtol=1e-6, atol=1e-6 * size)
  np.testing.assert_allclose(
    conv.reshape(M, N), want, rtol=1e-6, atol=1e-6 * size
  )


def test_the_plan_says_what_is_computed_how(results):
  model, *_ = results
  ways = {
    (site.paths[0].strip('/').split('/')[0], site.kind): site.compute
    for site in model.plan.sites.values()
  }
  for name, quantizer in WEIGHTS.items():
    whole = quantizer.per == 'channel'
    exact = name not in SIMULATED
    assert ways[name, 'dot'] == ('int8' if exact else 'simulated')
    assert ways[name, 'conv'] == ('int8' if exact and whole else 'simulated')


def test_a_table_is_the_values_of_the_format():
  for name in ('fp4_e2m1', 'pow2_4'):
    found = tables.exact(formats.get(name))
    codes = jnp.arange(len(found.entries), dtype=jnp.uint8)
    np.testing.assert_array_equal(
      found.entries * np.float64(found.unit), formats.get(name).decode(codes)
    )
  for name in ('nf4', 'codebook_4', 'pow2_5', 'fp6_e2m3', 'int4', 'fp8_e4m3'):
    assert tables.exact(formats.get(name)) is None


def test_exact_formats_take_the_integer_kernels(results):
  *_, chosen = results
  assert sum(c.op == 'lut_matmul' for c in chosen) == 4
  assert sum(c.op == 'int8_conv' for c in chosen) == 2
