"""Plans: made from shapes, checked, printed, stored and read again."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax
from oracle import snap

import quantlab as ql
from quantlab import summary

W8, W4 = ql.int8(), ql.int4()
A8 = ql.int8(per='token')
STATIC = ql.int8(per='tensor', static=True, symmetric=False)


X = normal(9, 4, 8)
PARAMS = {
  'norm': jnp.ones(8),
  'in': normal(0, 8, 12),
  'stack': normal(1, 3, 12, 12),
  'out': normal(2, 12, 4),
}


def apply(p, x):
  h = (x * p['norm']) @ p['in']
  h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, p['stack'])
  return h @ p['out']


RULES = {
  'in': ql.rule(weight=W8, input=STATIC),
  'stack': ql.rule(weight=ql.int4(group=4), input=STATIC),
  'out': ql.rule(weight=ql.nf4(group=12), output=A8),
}


@pytest.fixture(scope='module')
def model():
  return ql.ptq(apply, PARAMS, RULES, [X])


def shapes(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def test_a_plan_needs_shapes_alone(model):
  plan = ql.plan(apply, shapes(PARAMS), RULES, shapes(X))
  assert plan.to_json() == model.plan.to_json()


def test_json_round_trip_behaves_the_same(model):
  text = json.dumps(model.plan.to_json())
  plan = ql.Plan.from_json(json.loads(text))
  assert json.dumps(plan.to_json()) == text
  again = ql.quantized(apply, plan)
  np.testing.assert_array_equal(
    again(model.params, X), model.apply(model.params, X)
  )
  variables = {'weights': PARAMS, 'sites': model.params['sites']}
  a, b = (ql.fake_quantized(apply, p) for p in (plan, model.plan))
  np.testing.assert_array_equal(a(variables, X), b(variables, X))


def test_a_file_of_several_plans_is_no_plan():
  plan = ql.plan(apply, PARAMS, RULES, X)
  kept = {'int8/uniform': plan.to_json(), 'int4/kl-dp': plan.to_json()}
  with pytest.raises(ValueError, match=r"pass one: data\['int8/uniform'\]"):
    ql.Plan.from_json(kept)
  with pytest.raises(ValueError, match='this is no plan, which has sites'):
    ql.Plan.from_json({})


def test_state_matches_its_abstract_self(model):
  def kind(x):
    return jnp.shape(x), jnp.result_type(x)

  got = jax.tree.map(kind, model.params['sites'])
  want = jax.tree.map(kind, model.plan.abstract_state())
  assert got == want


def test_totals_are_those_of_the_model(model):
  found = summary.totals(model.plan)
  assert found['quantized_bytes'] == model.nbytes
  coded = [PARAMS[k] for k in ('in', 'stack', 'out')]
  elements = sum(w.size for w in coded)
  codes = 96 + 3 * 12 * 12 // 2 + 48 // 2  # 8, 4 and 4 bits
  scales = 4 * (12 + 3 * 3 * 12 + 4)
  assert found['bits_per_weight'] == 8 * (codes + scales) / elements
  assert found['float_bytes'] == 4 * (elements + 8)
  assert found['weights_covered'] == elements / (elements + 8)
  assert found['macs_covered'] == 1
  assert model.nbytes == codes + scales + 8 * 4 + 2 * 4 * (1 + 3)


def test_summary_tells_what_a_reader_needs(model):
  text = model.summary()
  assert '3 of 3 sites quantized' in text
  assert 'nf4(group=12)' in text
  assert '3 x 12 x 12' in text
  plan = ql.plan(apply, PARAMS, {'in': W8}, X)
  lines = summary.text(plan).splitlines()
  assert 'left in float: stack, out' in lines
  assert any('1 of 3 sites quantized' in line for line in lines)


def test_summary_shows_notes():
  def tied(p, x):
    return (x @ p['w']) @ p['w'].T

  plan = ql.plan(tied, {'w': normal(0, 8, 6)}, {'w': W8}, X)
  text = summary.text(plan)
  assert 'note: w: its use at w:1 contracts other axes than at w' in text


def test_macs_and_kinds():
  def conv(p, x):
    y = lax.conv_general_dilated(
      x,
      p['kernel'],
      (2, 2),
      'VALID',
      dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
    )
    return p['table'][jnp.argmax(y.reshape(2, -1), -1) % 5]

  params = {'kernel': normal(0, 3, 3, 4, 6), 'table': normal(1, 5, 8)}
  plan = ql.plan(conv, params, {'': W8}, normal(2, 2, 7, 7, 4))
  kernel, table = plan.sites['kernel'], plan.sites['table']
  assert (kernel.kind, kernel.matrix) == ('conv', (36, 6))
  assert kernel.macs == 2 * 3 * 3 * 6 * 36
  assert (table.kind, table.matrix, table.macs) == ('gather', (8, 5), 0)
  scan = ql.plan(apply, PARAMS, RULES, X).sites['stack']
  assert scan.macs == 3 * 4 * 12 * 12
  assert scan.loops == scan.weight_loops == (3,)


def test_a_plan_holds_for_its_program():
  params = {'w': normal(0, 8, 8), 'extra': normal(1, 8, 8)}

  def both(p, x, decode=False):
    y = x @ p['w']
    return y @ p['extra'] if decode else y

  plan = ql.plan(both, params, {'': W8}, X)
  run = ql.quantized(both, plan)
  with pytest.raises(ValueError, match=r'does not know: extra\.'):
    run(params, X, decode=True)
  # Fewer sites are fine: a part of the program that was planned.
  plan = ql.plan(both, params, {'': W8}, X, decode=True)
  model = ql.ptq(lambda p, x: both(p, x, True), params, {'': W8}, [X])
  out = ql.quantized(both, plan)(model.params, X)
  np.testing.assert_allclose(
    out, X @ snap.symmetric(params['w'], 0), rtol=1e-5, atol=1e-5
  )


def test_a_lookup_has_no_input_range():
  def embed(p, ids):
    return p['table'][ids] @ p['w']

  params = {'table': normal(0, 5, 8), 'w': normal(1, 8, 8)}
  ids = jnp.array([0, 3, 4])
  model = ql.ptq(embed, params, {'': ql.rule(weight=W8, input=STATIC)}, [ids])
  assert set(model.params['sites']) == {'w'}
  table = snap.symmetric(params['table'], 1)
  rows = np.asarray(params['table'])[ids]
  x = snap.fixed(table[ids], rows.min(), rows.max())
  np.testing.assert_allclose(
    model.apply(model.params, ids),
    x @ snap.symmetric(params['w'], 0),
    rtol=1e-4,
    atol=1e-4,
  )


def test_products_of_two_activations():
  def attend(p, x):
    q, k = x @ p['q'], x @ p['k']
    return jax.nn.softmax(q @ k.T) @ x

  # Of forty draws the median error is 0.005; it is larger for a few, whose
  # softmax is sharp.
  params = {'q': normal(3, 8, 8), 'k': normal(4, 8, 8)}
  for input_ in (A8, STATIC):
    rule = ql.rule(lhs=input_, rhs=input_)
    model = ql.ptq(attend, params, {'site:dot': rule}, [X])
    assert [s.compute for s in model.plan.quantized.values()] == ['int8'] * 2
    out = model.apply(model.params, X)
    simulated = ql.fake_quantized(attend, model.plan)
    variables = {'weights': params, 'sites': model.params['sites']}
    np.testing.assert_allclose(
      simulated(variables, X), out, rtol=1e-4, atol=1e-4
    )
    q, k = np.asarray(X @ params['q']), np.asarray(X @ params['k'])
    snapped = (
      (lambda v, axis: snap.symmetric(v, axis))
      if input_ is A8
      else (lambda v, axis: snap.fixed(v, v.min(), v.max()))
    )
    scores = np.asarray(jax.nn.softmax(snapped(q, 1) @ snapped(k, 1).T))
    if input_ is A8:
      want = snapped(scores, 1) @ snapped(np.asarray(X), 0)
      np.testing.assert_allclose(out, want, rtol=1e-4, atol=1e-4)
    assert 1e-4 < snap.error(out, attend(params, X)) < 3e-2


def test_memory_is_estimated_from_shapes(model):
  found = summary.memory(model.plan)
  assert (
    found['weights']
    == 4 * sum(math.prod(w.shape) for w in PARAMS.values()) + model.nbytes
  )
  assert found['activations'] == 4 * (4 * 12 + 12 * 12 + 4 * 12)


def test_equal_formats_of_a_shared_parameter():
  params = {'w': normal(0, 8, 8)}

  def twice(p, x):
    return jnp.tanh(x @ p['w']) @ p['w']

  with pytest.raises(ValueError) as caught:
    ql.plan(twice, params, {'site:^w$': W8, 'site:w:1': W4}, X)
  assert "'w' is stored once but its uses ask for two formats" in str(
    caught.value
  )
  with pytest.raises(ValueError, match=r"left in float at 'w:1', and it is"):
    ql.plan(twice, params, {'site:^w$': W8}, X)
  with pytest.raises(ValueError, match=r"left in float at 'w:1', and it is"):
    ql.plan(twice, params, {'site:^w$': W8, 'site:w:1': ql.rule(input=A8)}, X)


def test_activations_alone():
  params = {'w': normal(0, 8, 8)}
  plan = ql.plan(lambda p, x: x @ p['w'], params, {'w': ql.rule(input=A8)}, X)
  assert not plan.leaves
  out = ql.quantized(lambda p, x: x @ p['w'], plan)(params, X)
  want = snap.symmetric(X, 1) @ params['w']
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_sites_too_small_to_pay_are_told_and_may_be_left():
  """Tied parameters only where float is faster at every use."""

  def f(p, x):
    y = jax.nn.relu(x @ p['small']) @ p['wide']
    return y @ p['tied'] @ p['large'] @ p['large'].T @ p['tied'].T

  shapes = {'small': (16, 16), 'wide': (16, 512), 'tied': (512, 8)}
  params = {k: normal(0, *s) for k, s in shapes.items()}
  params['large'] = normal(1, 8, 2**17)
  x = normal(2, 4, 16)
  rule = ql.rule(weight=ql.int8(), input=ql.int8(per='token'))
  plan = ql.plan(f, params, {'.*': rule}, x)
  assert {k for k, s in plan.sites.items() if s.compute == 'int8'} > {'small'}
  assert 'small' in plan.slower
  assert 'large' not in plan.slower
  [line] = [t for t in plan.summary().splitlines() if 'too small' in t]
  assert 'small' in line
  assert 'large' not in line
  kept = ql.plan(f, params, plan.keep_float(plan.slower), x)
  assert set(plan.slower) == {k for k, s in kept.sites.items() if not s.rule}
  assert not kept.slower
  with pytest.raises(ValueError, match="unknown sites \\['smal'\\]"):
    plan.keep_float(['smal'])
