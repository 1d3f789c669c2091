"""Causes of bad sites, from tables of statistics and from sick models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantlab as ql
from quantlab import report
from quantlab.report import causes

_WEIGHT = {'weight_sqnr': 10.0, 'input_sqnr': 30.0, 'arriving_sqnr': 'inf'}
_INPUT = {'weight_sqnr': 30.0, 'input_sqnr': 10.0, 'arriving_sqnr': 40.0}


@pytest.mark.parametrize(
  ('found', 'cause', 'remedy'),
  [
    (
      _WEIGHT | {'too_few_rows': 50, 'inputs': 144},
      '50 calibration rows for 144 inputs',
      '3 times the samples',
    ),
    (
      _WEIGHT | {'collapsed': 2, 'channels': 8},
      '2 of 8 output channels collapsed',
      'scale=mse(), more bits or bias_correction()',
    ),
    (
      _INPUT | {'outlier': 40.0, 'outlier_channel': 3},
      'outlier channel 3 of the input, 40 times',
      'smooth(), outlier_suppression() or rotate()',
    ),
    (
      _WEIGHT | {'imbalance': 9.0, 'weight_per': 'tensor'},
      'the largest is 9 times',
      "per='channel' or cross_layer_equalization()",
    ),
    (_WEIGHT | {'tail': 9.0}, 'heavy tails', 'scale=mse()'),
    (
      _WEIGHT | {'position': 'first', 'inputs': 9, 'weight_bits': 4},
      'first layer, with 9 inputs, at 4 bits',
      '8 bits',
    ),
    (
      _INPUT | {'position': 'last', 'weight_bits': 8, 'input_bits': 4},
      'last layer, which makes the outputs, at 4 bits',
      '8 bits',
    ),
    (
      _WEIGHT | {'weight_bits': 3, 'weight_grouped': True, 'inputs': 64},
      '3 bits are few for this weight',
      'scale=mse(), gptq() or more bits',
    ),
    (
      _INPUT | {'input_bits': 4},
      '4 bits are few for this input',
      'rotate() or more bits',
    ),
    (
      _INPUT | {'arriving_sqnr': 8.0},
      'noise arrives with the input',
      'the sites before it',
    ),
    (_WEIGHT | {'weight_bits': 8}, 'no single cause found', ''),
    ({}, 'no single cause found', ''),
  ],
)
def test_a_cause_and_its_remedy(found, cause, remedy):
  got = causes.diagnose(found)
  assert cause in got.cause
  assert remedy in got.remedy
  assert str(got).count('.') >= 1


def test_a_quiet_part_is_not_blamed():
  found = _WEIGHT | {'outlier': 90.0, 'outlier_channel': 1, 'tail': 9.0}
  assert 'heavy tails' in causes.diagnose(found).cause
  found = found | {'input_sqnr': 11.0}  # nearly as loud
  assert 'outlier channel' in causes.diagnose(found).cause


def test_what_was_applied_is_not_proposed_again():
  found = _INPUT | {'outlier': 40.0, 'outlier_channel': 3}
  got = causes.diagnose(found, ['smooth', 'gptq'])
  assert got.remedy == 'outlier_suppression() or rotate()'
  everything = ['smooth', 'outlier_suppression', 'rotate']
  assert causes.diagnose(found, everything).remedy == 'more bits for the input'


def test_bad_sites_are_far_below_the_median_or_among_the_worst_and_poor():
  def rows(*sqnr):
    return [
      {'site': str(i), 'weight': 'int8()', 'sqnr': x}
      for i, x in enumerate(sqnr)
    ]

  def names(*sqnr):
    return [r['site'] for r in causes.bad(rows(*sqnr))]

  assert names(40, 29, 40, 41, 'inf') == ['1']
  assert names(40, 31, 40) == []
  assert names(*[19] * 7) == list('01234')
  assert names('nan', 15) == ['1']
  assert causes.bad([{'site': 'a', 'sqnr': 1.0}]) == []  # left in float
  assert causes.bad([]) == []


def _net(params, x):
  x = jax.nn.relu(x @ params['a'])
  x = jax.nn.relu(x @ params['b'])
  return x @ params['c']


def _looked(params, x, recipe):
  model = ql.ptq(_net, params, recipe, [x])
  noise = ql.site_sqnr(_net, params, model, [x])
  found = report.look(_net, params, model, x, noise, list(model.plan.sites))
  return noise, {k: v['statistics'] for k, v in found.items()}


@pytest.fixture
def healthy():
  draw = np.random.RandomState(0)
  x = jnp.asarray(draw.normal(size=(64, 32)), jnp.float32)
  params = {
    k: jnp.asarray(draw.normal(size=(32, 32)) / 6, jnp.float32) for k in 'abc'
  }
  return params, x


def test_an_outlier_channel_of_an_input_is_found(healthy):
  params, x = healthy
  recipe = {'.*': ql.rule(weight=ql.int8(), input=ql.int8(per='tensor'))}
  sick = {**params, 'a': params['a'].at[:, 5].mul(100)}
  _, found = _looked(sick, x, recipe)
  assert found['b']['outlier_channel'] == 5
  assert 'outlier channel 5' in causes.diagnose(found['b']).cause
  _, found = _looked(params, x, recipe)
  assert found['b']['outlier'] < 4


def test_imbalance_and_collapse_of_a_weight_are_found(healthy):
  params, x = healthy
  sick = {**params, 'b': params['b'].at[:, 5].mul(100)}
  _, found = _looked(sick, x, {'.*': ql.int4(per='tensor')})
  assert found['b']['imbalance'] > 40
  assert found['b']['collapsed'] == 31  # beside channel 5 all are zero
  assert 'collapsed' in causes.diagnose(found['b']).cause
  _, found = _looked(sick, x, {'.*': ql.int4()})
  assert found['b']['collapsed'] == 0


def test_lookups_stacks_and_activation_products_are_looked_at(healthy):
  params, _ = healthy

  def net(params, ids):
    x = params['embed'][ids]

    def layer(x, w):
      scores = jax.nn.softmax(jnp.einsum('btd,bsd->bts', x, x))
      return x + jnp.einsum('bts,bsd->btd', scores, x) @ w, None

    return jax.lax.scan(layer, x, params['layers'])[0]

  both = ql.int8(per='token')
  stack = jnp.stack([params['a'], params['b'], 3 * params['c']])
  params = {'embed': params['a'], 'layers': stack}
  ids = jnp.arange(24).reshape(4, 6)
  recipe = {'site:dot_': ql.rule(lhs=both, rhs=both), '.*': ql.int4()}
  model = ql.ptq(net, params, recipe, [ids])
  noise = ql.site_sqnr(net, params, model, [ids])
  names = list(noise)
  found = report.look(net, params, model, ids, noise, names)
  assert found.keys() == set(model.plan.quantized)
  lookup = found['embed']['statistics']
  assert 'gptq' not in causes.diagnose(lookup).remedy
  assert causes.diagnose(lookup).cause == '4 bits are few for this weight'
  assert lookup['layer'] == []
  [worst] = found['layers']['statistics']['layer']
  assert worst == int(np.argmin(noise['layers']['output']))
  for name in names:
    assert ('input' in found[name]['before']) == (name != 'embed')


def test_parts_of_the_noise_are_shares_of_the_products(healthy):
  params, x = healthy
  noise, found = _looked(params, x, {'a': ql.int3(), '.*': ql.int8()})
  # The first product: no other noise than that of its weight.
  assert found['a']['arriving_sqnr'] == float('inf')
  assert found['a']['weight_sqnr'] == pytest.approx(
    float(noise['a']['output']), abs=1e-3
  )
  assert 'arrives' in causes.diagnose(found['b']).cause
