"""Costs: counted by hand, and equal to what the quantized model holds."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph import programs
from jax import lax

import quantlab as ql
from quantlab.models import digits

W = programs.Random(3)
X = W(4, 8)
A8 = ql.int8(per='token')
STATIC = ql.int8(per='tensor', static=True, symmetric=False)


def dense(params, x):
  return jax.nn.relu(x @ params['a']) @ params['b']


PARAMS = {'a': W(8, 12), 'b': W(12, 10), 'unused': W(3)}


def plan_of(rules, apply=dense, params=PARAMS, x=X):
  return ql.plan(apply, params, rules, x)


@pytest.mark.parametrize(
  'weight',
  [
    ql.int3(group=5, ragged=True, symmetric=False),
    ql.int4(),
    ql.codebook(per='channel'),
    ql.mxfp4(ragged=True),
    ql.nvfp4(ragged=True),
    ql.ternary(),
    ql.int6(block=(4, 6), ragged=True, scale_format='bfloat16'),
  ],
  ids=lambda q: q.format.name,
)
def test_bytes_are_those_of_the_model(weight):
  rules = {'^/a': ql.rule(weight=weight, input=STATIC), '^/b': ql.int8()}
  model = ql.ptq(dense, PARAMS, rules, [X])
  by_site = ql.cost.nbytes(model.plan)
  assert by_site['b'] == ql.nbytes(model.params['weights']['b'])
  held = model.params['weights']['a'], model.params['sites']['a']
  assert by_site['a'] == ql.nbytes(held)
  assert ql.cost.rest_nbytes(model.plan) == 3 * 4
  assert sum(by_site.values()) + 12 == model.nbytes


def test_bytes_of_folded_stacked_tied_and_float_weights():
  cnn = digits.Cnn((4, 4, 4))
  params = programs.filled(digits.shapes(cnn))
  image = np.zeros((1, 8, 8, 1), np.float32)
  rules = {'conv_1': ql.int4(), 'conv_2': None, '.*': ql.int8()}
  model = ql.ptq(cnn.apply, params, rules, [image])
  found = ql.cost.nbytes(model.plan)
  total = sum(found.values()) + ql.cost.rest_nbytes(model.plan)
  assert model.plan.folded
  assert total == model.nbytes
  assert found['params/conv_2/kernel'] == 4 * 3 * 3 * 4 * 4

  def tied(p, x):
    h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p['stack'])
    return (h @ p['e']) @ p['e'].T

  params = {'stack': W(3, 8, 8), 'e': W(8, 6)}
  model = ql.ptq(tied, params, {'': ql.int4(group=2)}, [X])
  found = ql.cost.nbytes(model.plan)
  assert sum(found.values()) == model.nbytes
  assert found['e:1'] == 0  # stored once, counted where it is first used
  assert found['stack'] == 3 * (8 * 8 // 2 + 4 * 8 * 4)


def test_products_and_bits_by_hand():
  plan = plan_of({'a': ql.rule(weight=ql.int4(), input=A8), 'b': ql.int3()})
  assert ql.cost.macs(plan) == {'a': 4 * 8 * 12, 'b': 4 * 12 * 10}
  assert ql.cost.bops(plan) == {'a': 4 * 8 * 12 * 32, 'b': 4 * 12 * 10 * 96}
  wide = ql.cost.bops(plan, float_bits=16)
  assert wide['b'] == 4 * 12 * 10 * 48


def test_energy_by_hand():
  plan = plan_of({'a': ql.rule(weight=ql.int4(), input=A8), 'b': ql.int8()})
  found = ql.cost.energy(plan)
  stored = ql.cost.nbytes(plan)
  macs = 4 * 8 * 12
  want = macs * (0.2 * 4 * 8 / 64 + 0.1)
  want += (4 * 8 * 1 + 4 * 12 * 4) * 10 / 8 + stored['a'] * 1300 / 8
  assert found['a'] == pytest.approx(want)
  # A product with a float input is a float product, whatever is stored.
  want = 4 * 12 * 10 * (3.7 + 0.9)
  want += (4 * 12 * 4 + 4 * 10 * 4) * 10 / 8 + stored['b'] * 1300 / 8
  assert found['b'] == pytest.approx(want)
  free = dataclasses.replace(ql.cost.Energy(), dram_byte=0.0, sram_byte=0.0)
  assert ql.cost.energy(plan, free)['b'] == pytest.approx(480 * 4.6)


def test_latency_from_a_table():
  plan = plan_of({'a': ql.rule(weight=ql.int4(), input=A8), 'b': ql.int8()})
  keys = [ql.cost.LatencyTable.key(s) for s in plan.sites.values()]
  assert keys[0] == 'dot 4x8x12 int4 per channel x int8 per token'
  table = ql.cost.LatencyTable('a chip', {keys[0]: 0.25, keys[1]: 0.5})
  again = ql.cost.LatencyTable.from_json(
    json.loads(json.dumps(table.to_json()))
  )
  assert again(plan) == {'a': 0.25, 'b': 0.5}
  with pytest.raises(ValueError, match=r"'a chip' lacks \['dot 4x8x12 int2"):
    table(plan_of({'a': ql.rule(weight=ql.int2(), input=A8), 'b': ql.int8()}))
  with pytest.raises(ValueError, match='finite'):
    ql.cost.LatencyTable('a chip', {'dot': float('nan')})


def test_latency_of_a_roofline():
  plan = plan_of({'a': ql.rule(weight=ql.int4(), input=A8), 'b': ql.int8()})
  ways = {s.compute for s in plan.sites.values()}
  peaks = dict.fromkeys(ways, 1e3)
  slow = ql.cost.roofline(plan, macs_per_second=peaks, bytes_per_second=1e9)
  assert slow == {'a': 0.384, 'b': 0.48}
  bound = ql.cost.roofline(plan, macs_per_second=peaks, bytes_per_second=10)
  assert bound['a'] == ql.cost.nbytes(plan)['a'] / 10
  with pytest.raises(ValueError, match='has no peak'):
    ql.cost.roofline(plan, macs_per_second={}, bytes_per_second=1)


def test_peak_memory_by_hand():
  def chain(p, x):  # x (4, 8) 128 bytes
    h = x @ p['a']  # (4, 12), 192: x and h
    h = jnp.tanh(h)  # 192 + 192, x is dead
    return h @ p['b']  # (4, 10), 160

  assert ql.cost.peak_memory(chain, PARAMS, X) == (384, 'tanh')
  assert ql.cost.peak_memory(chain, PARAMS, X, bits=8).nbytes == 96

  def residual(p, x):
    h = jnp.tanh(x @ p['a'])
    return jnp.sin(h) @ p['b'], x  # x lives to the end: 128 more

  found = ql.cost.peak_memory(residual, PARAMS, X)
  assert found.nbytes == 384 + 128
  with pytest.raises(ValueError, match='positive width'):
    ql.cost.peak_memory(chain, PARAMS, X, bits=0)


def test_peak_memory_inside_loops_and_calls():
  stack = W(3, 8, 8)

  def scanned(p, x):
    def step(h, w):
      h = jnp.tanh(h @ w)
      return h, h[0]

    return lax.scan(step, x, p)

  found = ql.cost.peak_memory(scanned, stack, X)
  # Outside: x, the last h, the stack of rows. Inside: a weight's slice and
  # the product.
  outside, inside = 128 + 128 + 3 * 32, 8 * 8 * 4 + 128
  assert found == (outside + inside, 'scan/dot_general')

  def called(p, x):
    return jax.jit(lambda h: jnp.tanh(jnp.sin(h)))(x)

  # x and the result outside, sin's result inside.
  found = ql.cost.peak_memory(called, (), X)
  assert found == (3 * 128, 'jit/sin')
