"""Corrections of mean and variance: exact where they should be."""

import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantlab as ql
from quantlab.ptq.local import OutputMoments

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
  chain = ql.chain(ql.rtn(), ql.batch_norm_reestimation(epsilon=1e-12))
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


def test_a_variance_beside_a_large_mean():
  """Batch after batch; E[y^2] - E[y]^2 would be rounding errors."""
  r = np.random.default_rng(0)
  y = (100 + 0.03 * r.normal(size=(4, 256, 3))).astype(np.float32)
  site = types.SimpleNamespace(
    id='w',
    weight_shape=(1, 3),
    dims=types.SimpleNamespace(w_free=(1,), w_batch=(), out_rows=lambda y: y),
  )
  observer = OutputMoments(['w'])
  parts = [
    observer.update(site, observer.init(site), None, None, jnp.asarray(b), None)
    for b in y
  ]
  total = functools.reduce(lambda a, b: observer.merge(site, a, b), parts)
  found = observer.result(total)
  flat = y.reshape(-1, 3).astype(float)
  np.testing.assert_allclose(found['mean'], flat.mean(0), rtol=1e-6)
  np.testing.assert_allclose(found['var'], flat.var(0), rtol=1e-2)


class Blocks:
  """Three residual blocks behind RMSNorms; the gain may be one for all."""

  def __init__(self, shared: bool):
    self.shared = shared

  def params(self):
    keys = jax.random.split(jax.random.key(0), 7)
    gains = jnp.linspace(0.5, 2, 12)
    blocks = [
      {
        'up': jax.random.normal(keys[2 * i], (12, 24)) / 3,
        'down': jax.random.normal(keys[2 * i + 1], (24, 12)) / 5,
      }
      | ({} if self.shared else {'gain': gains})
      for i in range(3)
    ]
    out = {'blocks': blocks, 'last': gains}
    out['head'] = jax.random.normal(keys[6], (12, 7)) / 3
    return out | ({'gain': gains} if self.shared else {})

  def __call__(self, p, x):
    def norm(x, gain):
      return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6) * gain

    for b in p['blocks']:
      y = norm(x, p['gain'] if self.shared else b['gain'])
      x = x + jax.nn.gelu(y @ b['up']) @ b['down']
    return norm(x, p['last']) @ p['head']


def tweaked(apply, params, **options):
  batches = [images(i, 32, 12) for i in range(3)]
  recipe = {'up$|down$|head$': ql.int3()}
  chain = ql.chain(ql.rtn(), ql.norm_tweak(**options))
  model = ql.ptq(apply, params, recipe, batches, chain)
  facts = {b['block']: b['tuned']['norm_tweak'] for b in model.report['blocks']}
  return model.params['weights'], [f for f in facts.values() if f]


def test_a_block_that_became_worse_keeps_its_gains():
  apply = Blocks(shared=False)
  params = apply.params()
  gentle, facts = tweaked(apply, params, learning_rate=1e-3)
  assert any(f['kept'] for f in facts)
  assert all(f['after'] <= f['before'] for f in facts if f['kept'])
  moved = [g['gain'] for g in gentle['blocks']]
  assert any(np.any(g != params['last']) for g in moved)
  np.testing.assert_array_equal(gentle['last'], params['last'])  # the logits'
  wild, facts = tweaked(apply, params, learning_rate=3.0)
  assert not any(f['kept'] for f in facts)
  for block in wild['blocks']:
    np.testing.assert_array_equal(block['gain'], params['last'])


def test_a_gain_of_several_blocks_is_left():
  """Each block would want another one."""
  apply = Blocks(shared=True)
  params = apply.params()
  weights, _ = tweaked(apply, params, learning_rate=1e-2)
  np.testing.assert_array_equal(weights['gain'], params['gain'])


def test_nothing_to_act_on():
  model, x = Mlp(), images(0, 64, 8)
  params = model.init(jax.random.key(9), x)
  for member, wanted in (
    (ql.norm_tweak(), 'gains and biases'),
    (ql.batch_norm_reestimation(), 'BatchNorm'),
  ):
    with pytest.raises(ValueError, match=f'nothing to act on.*{wanted}'):
      ql.ptq(model.apply, params, {'kernel$': W2}, [x], [ql.rtn(), member])


def test_arguments_out_of_range():
  for bad in ({'learning_rate': -1.0}, {'epochs': 0}, {'depth_scale': -1}):
    with pytest.raises(ValueError, match='norm_tweak takes'):
      ql.norm_tweak(**bad)
  with pytest.raises(ValueError, match='epsilon is positive'):
    ql.batch_norm_reestimation(0)
