"""SmoothQuant, OS+, AWQ and cross-layer equalization: formulas and gains."""

import functools
import json
import re

import jax
import numpy as np
import pytest
from graph import programs
from ptq import equivalents
from ptq.equivalents import sqnr

import quantlab as ql
from quantlab.models import transformer

STATIC = ql.rule(weight=ql.int8(), input=ql.int8(per='tensor', static=True))
W8A8 = {'block.*kernel$': STATIC}


@functools.cache
def language(seed):
  """(apply, parameters, batches, a batch that is not for calibration)."""
  model = transformer.Transformer(32, dim=32, heads=4, blocks=1, context=16)
  tokens = np.random.default_rng(seed).integers(0, 32, (3, 64, 16))
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens[0])
  params = programs.filled(shapes, seed)
  return jax.jit(model.apply), params, list(tokens[:2]), tokens[2]


def quality(seed, params, rules, transform=()):
  apply, clean, batches, test = language(seed)
  made = ql.ptq(apply, params, rules, batches, transform)
  return sqnr(apply(clean, test), made.apply(made.params, test)), made


# Against the paper's formulas ------------------------------------------------


def mlp(p, x):
  return jax.nn.relu(x @ p['a'] + p['c']) @ p['b']


def mlp_case(seed):
  """An MLP on inputs with outlier channels, and where it is off centre."""
  rng = np.random.default_rng(seed)
  spread = np.exp(rng.normal(size=16) * 1.5)
  batches = [
    ((rng.normal(size=(64, 16)) + rng.normal(size=16)) * spread).astype('f')
    for _ in range(3)
  ]
  new = programs.Random(seed)
  return {'a': new(16, 24), 'c': new(24), 'b': new(24, 8)}, batches


def prepared(member, seed, rules=None):
  params, batches = mlp_case(seed)
  program = programs.Program(mlp, params, (batches[0],))
  ctx = equivalents.context(program, rules or {'[ab]': STATIC}, batches)
  return member.run(ctx), params, np.concatenate(batches)


@pytest.mark.parametrize('alpha', [0.0, 0.3, 1.0])
def test_smooth_is_the_formula(alpha):
  ctx, params, x = prepared(ql.smooth(alpha), 0)
  hidden = np.maximum(x @ params['a'] + params['c'], 0)
  s, t = (
    np.abs(v).max(0) ** alpha / np.abs(w).max(1) ** (1 - alpha)
    for v, w in ((x, params['a']), (hidden, params['b']))
  )
  np.testing.assert_allclose(
    ctx.params['a'], params['a'] * s[:, None] / t, rtol=2e-5
  )
  np.testing.assert_allclose(ctx.params['b'], params['b'] * t[:, None], 2e-5)
  np.testing.assert_allclose(ctx.state['a']['transform']['gain'], 1 / s, 2e-5)
  facts = ctx.report['smooth']
  assert not facts['a']['folded']
  assert facts['b']['folded']
  assert facts['b']['largest'] == pytest.approx(t.max(), rel=1e-5)
  json.dumps(facts)


def test_a_channel_of_zeros_keeps_its_scale():
  params, batches = mlp_case(1)
  params['a'] = params['a'].at[3].set(0)
  batches = [x * (np.arange(16) != 5) for x in batches]
  program = programs.Program(mlp, params, (batches[0],))
  ctx = equivalents.context(program, {'[ab]': STATIC}, batches)
  for member in (ql.smooth(), ql.outlier_suppression(), ql.awq()):
    gain = member.run(ctx).state['a']['transform'].get('gain', np.ones(16))
    assert np.isfinite(gain).all()
    assert gain[5] == 1
  assert ql.smooth().run(ctx).state['a']['transform']['gain'][3] == 1


def test_outlier_suppression_centres_and_cuts():
  ctx, params, x = prepared(ql.outlier_suppression(), 2)
  found = ctx.state['a']['transform']
  centre = (x.max(0) + x.min(0)) / 2
  np.testing.assert_allclose(found['shift'], centre, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(
    ctx.state['a']['bias'] * _scale_of(ctx, params), centre @ params['a'], 1e-3
  )
  half = np.abs(x - centre).max(0)
  threshold = (half * found['gain']).max()
  np.testing.assert_allclose(
    1 / found['gain'], np.maximum(1, half / threshold), rtol=1e-4
  )
  fact = ctx.report['outlier_suppression']['a']
  assert fact['shifted']
  assert fact['error'] < 0.8
  plain = prepared(ql.outlier_suppression(shift=False), 2)[0]
  assert 'shift' not in plain.state['a']['transform']


def _scale_of(ctx, params):
  """What the hidden channels were divided by."""
  return np.asarray(params['c'] / ctx.params['c'])


def test_equalized_channels_have_one_range():
  ctx, *_ = prepared(ql.cross_layer_equalization(), 3)
  np.testing.assert_allclose(
    np.abs(ctx.params['a']).max(0), np.abs(ctx.params['b']).max(1), rtol=1e-4
  )


@pytest.mark.parametrize(
  ('member', 'sites'),
  [(ql.smooth(0.7), 'b'), (ql.cross_layer_equalization(), '[ab]')],
)
def test_any_scale_before_gives_the_same_weights_after(member, sites):
  params, batches = mlp_case(4)
  s = np.exp(np.random.default_rng(5).normal(size=24)).astype(np.float32)
  other = {
    'a': params['a'] * s,
    'c': params['c'] * s,
    'b': params['b'] / s[:, None],
  }
  after = [
    member.run(
      equivalents.context(
        programs.Program(mlp, p, (batches[0],)), {sites: STATIC}, batches
      )
    ).params
    for p in (params, other)
  ]
  for name in params:
    np.testing.assert_allclose(after[0][name], after[1][name], rtol=2e-3)


def linear(p, x):
  return x @ p['a']


@pytest.mark.parametrize('bits', [ql.int3, ql.int4])
def test_awq_never_loses_to_rounding_and_gains_on_outliers(bits):
  gains, rules = [], {'a': ql.rule(weight=bits(group=8))}
  for seed in range(4):
    params, batches = mlp_case(seed)
    found = [
      ql.ptq(linear, params, rules, batches[:2], t)
      for t in (ql.rtn(), ql.awq(rows=64))
    ]
    assert found[1].report['awq']['a']['error'] <= 1
    want = linear(params, batches[2])
    plain, scaled = (sqnr(want, q.apply(q.params, batches[2])) for q in found)
    gains.append(scaled - plain)
  assert min(gains) > -0.5, gains
  assert np.mean(gains) > 1, gains


def test_awq_with_the_exponent_zero_alone_is_rounding():
  ctx, params, _ = prepared(ql.awq(grid=1), 0)
  for name in params:
    np.testing.assert_array_equal(ctx.params[name], params[name])


# As members of a chain -------------------------------------------------------


def test_a_quantized_model_runs_saves_and_loads(tmp_path):
  apply, params, batches, test = language(0)
  members = ql.chain(ql.outlier_suppression(grid=4), ql.smooth(), ql.rtn())
  made = ql.ptq(apply, params, W8A8, batches, members)
  assert set(made.report) >= {'smooth', 'outlier_suppression'}
  eager = made.apply(made.params, test)
  jitted = jax.jit(made.apply)(made.params, test)
  np.testing.assert_allclose(eager, jitted, rtol=1e-4, atol=1e-4)
  ql.save(tmp_path / 'model', made)
  back = ql.load(tmp_path / 'model', apply)
  np.testing.assert_array_equal(back.apply(back.params, test), eager)


def test_misordered_and_empty_members_are_refused():
  with pytest.raises(ValueError, match=re.escape('smooth() (prepare) cannot')):
    ql.chain(ql.gptq(), ql.smooth())
  params, batches = mlp_case(0)
  weights = {'[ab]': ql.rule(weight=ql.int8())}
  for member, role in (
    (ql.smooth(), 'input'),
    (ql.outlier_suppression(), 'input'),
  ):
    with pytest.raises(ValueError, match=f'quantizer for the {role}'):
      ql.ptq(mlp, params, weights, batches, member)
  one = {'a': params['a']}
  with pytest.raises(ValueError, match='pairs of the kinds conv, linear'):
    ql.ptq(
      lambda p, x: x @ p['a'],
      one,
      {'a': STATIC},
      batches,
      ql.cross_layer_equalization(),
    )


@pytest.mark.parametrize(
  'make',
  [
    lambda: ql.smooth(1.5),
    lambda: ql.awq(0),
    lambda: ql.outlier_suppression(grid=1),
    lambda: ql.cross_layer_equalization(sweeps=0),
  ],
)
def test_settings_out_of_range_are_refused(make):
  with pytest.raises(ValueError, match='got'):
    make()


def test_values_that_are_not_finite_are_refused_by_site():
  params, batches = mlp_case(0)
  batches[1] = np.where(np.arange(16) == 2, np.nan, batches[1])
  with pytest.raises(ValueError, match='in the input of a; remove'):
    ql.ptq(mlp, params, {'[ab]': STATIC}, batches, ql.smooth())
