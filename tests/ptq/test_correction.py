"""Corrections of mean and variance: exact where they should be."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantlab as ql

W2 = ql.rule(weight=ql.int2(), input=ql.int8(per='token'))


def images(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


class Mlp(nn.Module):
  """Three products, one without a bias."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(24, name='a')(x))
    x = x + nn.relu(nn.Dense(24, use_bias=False, name='b')(x))
    return nn.Dense(5, name='c')(x)


class Outputs:
  """Observer: mean of each output channel."""

  def init(self, site):
    n = int(np.prod([site.weight_shape[i] for i in site.dims.w_free]))
    return {'sum': jnp.zeros(n), 'rows': jnp.zeros(1)}

  def update(self, site, stat, lhs, rhs, out, state):
    y = site.dims.out_rows(out)
    new = {'sum': y.sum(0), 'rows': jnp.full(1, y.shape[0], jnp.float32)}
    return jax.tree.map(jnp.add, stat, new)

  def merge(self, site, a, b):
    return jax.tree.map(jnp.add, a, b)


def means(apply, params, batches, plan=None):
  run = ql.observe(apply, Outputs(), plan)
  total = None
  for x in batches:
    stats = run(params, x)[1]
    total = stats if total is None else jax.tree.map(jnp.add, total, stats)
  return {k: np.asarray(v['sum'] / v['rows']) for k, v in total.items()}


def test_every_output_has_the_float_mean():
  model, batches = Mlp(), [images(i, 64, 8) for i in range(3)]
  params = model.init(jax.random.key(9), batches[0])
  recipe = {'kernel$': W2}
  plain = ql.ptq(model.apply, params, recipe, batches)
  chain = ql.chain(ql.rtn(), ql.bias_correction())
  mended = ql.ptq(model.apply, params, recipe, batches, chain)
  want = means(model.apply, params, batches)
  before = means(model.apply, plain.params, batches, plain.plan)
  after = means(model.apply, mended.params, batches, mended.plan)
  for site, mean in want.items():
    np.testing.assert_allclose(after[site], mean, atol=1e-5)
    assert np.abs(before[site] - mean).max() > 1e-2
  assert mended.report['blocks'][0]['tuned']['bias_correction']


def test_scanned_layers_get_a_bias_each():
  def apply(params, x):
    def layer(x, w):
      return x + jnp.tanh(x @ w), None

    return jax.lax.scan(layer, x, params['w'])[0]

  params = {'w': images(0, 3, 16, 16) / 3}
  batches = [images(1, 64, 16)]
  chain = ql.chain(ql.rtn(), ql.bias_correction())
  model = ql.ptq(apply, params, {'w': W2}, batches, chain)
  assert model.params['sites']['w']['bias'].shape == (3, 16)
  want = means(apply, params, batches)['w']
  got = means(apply, model.params, batches, model.plan)['w']
  np.testing.assert_allclose(got, want, atol=1e-5)


class Normed(nn.Module):
  """Convolutions with BatchNorm, depthwise among them."""

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), use_bias=False, name='c1')(x)
    x = nn.relu(nn.BatchNorm(use_running_average=True, name='n1')(x))
    x = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False, name='c2')(x)
    return nn.relu(nn.BatchNorm(use_running_average=True, name='n2')(x))


def test_re_estimated_batch_norms_have_float_mean_and_variance():
  model, x = Normed(), images(0, 32, 8, 8, 3)
  params = model.init(jax.random.key(1), x)
  rng = np.random.default_rng(2)
  params = jax.tree.map(
    lambda p: p + 0.3 * jnp.asarray(rng.random(p.shape), p.dtype), params
  )
  recipe = {'kernel$': ql.rule(weight=ql.int3(), input=ql.int8(per='token'))}
  chain = ql.chain(ql.rtn(), ql.batch_norm_reestimation(epsilon=0.0))
  mended = ql.ptq(model.apply, params, recipe, [x], chain)

  # What the last BatchNorm gives, before its relu, from both programs.
  class Last(Outputs):
    def init(self, site):
      start = super().init(site)
      return {**start, 'square': start['sum']}

    def update(self, site, stat, lhs, rhs, out, state):
      y = site.dims.out_rows(out)
      new = {
        'sum': y.sum(0),
        'rows': jnp.float32(y.shape[0]),
        'square': (y * y).sum(0),
      }
      return jax.tree.map(jnp.add, stat, new)

  given = ql.observe(model.apply, Last(), mended.plan)(mended.params, x)[1]
  floats = ql.observe(model.apply, Last(), mended.plan, quantize=False)
  wanted = floats(params, x)[1]
  for site in wanted:
    for name in ('sum', 'square'):
      a, b = (np.asarray(s[site][name]) for s in (given, wanted))
      np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-2)


def test_scales_that_cannot_hold_the_factor_are_refused():
  model, x = Normed(), images(0, 4, 8, 8, 3)
  params = model.init(jax.random.key(1), x)
  rule = ql.rule(weight=ql.int4(per='tensor'), input=ql.int8(per='token'))
  chain = ql.chain(ql.rtn(), ql.batch_norm_reestimation())
  with pytest.raises(ValueError, match='rescaled only where every channel'):
    ql.ptq(model.apply, params, {'kernel$': rule}, [x], chain)
