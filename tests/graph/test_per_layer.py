"""Rules by layer: a scanned model is the unrolled one, layer by layer."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph import programs

import quantlab as ql
from quantlab.core.tree import named_leaves
from quantlab.graph.segments import Segments
from quantlab.models import transformer
from quantlab.plan import Plan
from quantlab.recipe import Recipe

W = programs.Random(3)
LENGTH, DIM = 4, 8
PARAMS = {
  'layers': {
    'w': W(LENGTH, DIM, DIM, scale=0.5),
    'v': W(LENGTH, DIM, DIM, scale=0.5),
    'b': W(LENGTH, DIM),
  },
  'head': W(DIM, 3),
}
X = W(32, DIM, scale=1.0)
Q4, Q8 = ql.int4(), ql.int8()
A8 = ql.rule(weight=Q8, input=ql.int8(per='tensor', static=True))
BY_LAYER = [Q4, Q4, A8, None]
RECIPE = {'/w$': ql.per_layer(BY_LAYER), '/v$': Q8, 'head': Q4}


def layer(x, p):
  return x + jnp.tanh(x @ p['w'] + p['b']) @ p['v']


def scanned(params, x):
  x, _ = jax.lax.scan(lambda x, p: (layer(x, p), None), x, params['layers'])
  return x @ params['head']


def unstacked(params):
  each = [
    jax.tree.map(lambda a, i=i: a[i], params['layers']) for i in range(LENGTH)
  ]
  return {'layers': each, 'head': params['head']}


def unrolled(params, x):
  for p in params['layers']:
    x = layer(x, p)
  return x @ params['head']


UNROLLED = {
  **{f'layers/{i}/w': rule for i, rule in enumerate(BY_LAYER)},
  '/v$': Q8,
  'head': Q4,
}


@pytest.fixture(scope='module', params=[ql.rtn, ql.gptq])
def pair(request):
  """The model in a scan, and unrolled."""
  return (
    ql.ptq(scanned, PARAMS, RECIPE, [X], request.param()),
    ql.ptq(unrolled, unstacked(PARAMS), UNROLLED, [X], request.param()),
  )


def in_layers(model):
  """Every array of a model's weights with layers apart, by path."""
  found = {}
  for path, leaf in named_leaves(model.params['weights'], lambda x: False):
    if '/[' not in path:
      found[path] = leaf
      continue
    stack, _, rest = path.partition('/[')
    part, _, field = rest.partition(']')
    first = int(part.split('-')[0])
    for i, x in enumerate(leaf):
      found[f'{stack.replace("layers", f"layers/{first + i}")}{field}'] = x
  for i, b in enumerate(model.params['weights']['layers']['b']):
    found[f'layers/{i}/b'] = b
  found.pop('layers/b', None)
  return found


def close(a, b, atol=1e-6):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), a, b)


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_scanned_model_is_the_unrolled_one(pair):
  mine, other = pair
  close(mine.apply(mine.params, X), other.apply(other.params, X))
  close(jax.jit(mine.apply)(mine.params, X), other.apply(other.params, X))
  coded = in_layers(mine)
  want = dict(named_leaves(other.params['weights'], lambda x: False))
  assert sorted(coded) == sorted(want)
  for path, leaf in want.items():
    np.testing.assert_array_equal(coded[path], leaf, path)
  stack = mine.params['weights']['layers']['w']
  assert isinstance(stack, Segments)
  assert stack.lengths == (2, 1, 1)
  weights = [mine.params['weights']['layers'][k] for k in 'wv']
  for i, p in enumerate(other.params['weights']['layers']):
    for stack, q in zip(weights, (p['w'], p['v']), strict=True):
      q = q.dequantize() if isinstance(q, ql.QTensor) else q
      np.testing.assert_array_equal(stack.dequantize()[i], q)
  # Calibrated ranges of the layer that has them.
  [mine_range] = [
    s['input'] for s in mine.params['sites'].values() if 'input' in s
  ]
  close(
    mine_range['scale'][0],
    other.params['sites']['layers/2/w']['input']['scale'],
  )


def test_sizes_are_counted_as_they_are_stored(pair):
  mine, other = pair
  assert mine.nbytes == other.nbytes
  total = sum(ql.cost.nbytes(mine.plan).values())
  assert total + ql.cost.rest_nbytes(mine.plan) == mine.nbytes
  assert mine.plan.totals()['quantized_bytes'] == mine.nbytes
  bops = [sum(ql.cost.bops(m.plan).values()) for m in pair]
  assert bops[0] == bops[1]
  assert '[0-1], [2], [3]' in mine.summary()


def test_a_checkpoint_is_the_model(pair, tmp_path):
  mine, _ = pair
  ql.save(tmp_path / 'model', mine)
  for like in (None, PARAMS, mine.params['weights']):
    back = ql.load(tmp_path / 'model', scanned, like=like)
    same(back.params, mine.params)
    assert back.plan.to_json() == mine.plan.to_json()
  same(back.apply(back.params, X), mine.apply(mine.params, X))


def test_recipes_and_plans_are_json():
  recipe = ql.recipe(RECIPE)
  text = json.dumps(recipe.to_json())
  assert Recipe.from_json(json.loads(text)) == recipe
  plan = ql.plan(scanned, PARAMS, RECIPE, X)
  text = json.dumps(plan.to_json())
  assert json.dumps(Plan.from_json(json.loads(text)).to_json()) == text
  # A plan is a recipe, of the sites that the function has.
  again = ql.plan(scanned, PARAMS, plan, X)
  assert json.dumps(again.to_json()) == text
  assert 'site:^layers/w$' in dict(e[:2] for e in plan.recipe.entries)
  kept = ql.plan(scanned, PARAMS, plan.keep_float(['layers/v/[0-1]']), X)
  assert kept.sites['layers/v/[0-1]'].rule is None
  assert kept.sites['layers/v/[2]'].rule.weight == Q8


def test_layers_that_agree_are_one_stack():
  plain = {'/w$': A8, '/v$': Q4}
  by_layer = {'/w$': ql.per_layer([A8] * LENGTH), '/v$': Q4}
  one, other = (ql.ptq(scanned, PARAMS, r, [X]) for r in (plain, by_layer))
  assert one.plan.to_json() == other.plan.to_json()
  same(one.params, other.params)
  same(one.apply(one.params, X), other.apply(other.params, X))


def test_simulation_and_its_gradients_are_of_the_unrolled_model(pair):
  mine, other = (
    ql.fake_quantized(f, m.plan)
    for f, m in zip((scanned, unrolled), pair, strict=True)
  )

  def loss(f):
    return lambda p, state: (f({'weights': p, 'sites': state}, X) ** 2).sum()

  states = [m.params['sites'] for m in pair]
  got = jax.jit(jax.grad(loss(mine)))(PARAMS, states[0])
  want = jax.jit(jax.grad(loss(other)))(unstacked(PARAMS), states[1])
  close(unstacked(got), want, 1e-5)


def test_training_by_layers():
  recipe = RECIPE | {'/w$': ql.per_layer([Q4, Q4, Q8, None])}
  rules = UNROLLED | {'layers/2/w': Q8}
  lsq = ql.estimators.lsq()
  mine = ql.qat(scanned, ql.plan(scanned, PARAMS, recipe, X), lsq)
  flat = unstacked(PARAMS)
  other = ql.qat(unrolled, ql.plan(unrolled, flat, rules, X), lsq)
  v, u = mine.init(PARAMS), other.init(flat)
  close(mine.apply(v, X), other.apply(u, X))
  g = jax.jit(jax.grad(lambda v: (mine.apply(v, X) ** 2).sum()))(v)
  assert np.abs(g['sites']['layers/w/[0-1]']['weight']['step']).min() > 0
  v = jax.tree.map(lambda a, b: a - 1e-4 * b, v, g)
  frozen = mine.freeze(v)
  close(frozen.apply(frozen.params, X), mine.apply(v, X), 2e-5)


# Programs in which the scan is not the whole of it ----------------------------


def summed(x, p):
  return layer(x, p), x.sum(-1)


def backwards(params, x):
  x, sums = jax.lax.scan(summed, x, params['layers'], reverse=True, unroll=2)
  return x @ params['head'], sums


def wrapped(params, x):
  """A call, a cast and a remat around."""

  @jax.jit
  def stack(layers, x):
    layers = jax.tree.map(lambda a: a.astype(jnp.bfloat16), layers)
    body = jax.checkpoint(lambda x, p: summed(x.astype(jnp.bfloat16), p))
    return jax.lax.scan(body, x.astype(jnp.bfloat16), layers)

  x, sums = stack(params['layers'], x)
  return x @ params['head'], sums


def over_time(params, x):
  """All layers at every time step."""

  def step(x, t):
    y, sums = jax.lax.scan(summed, x + t, params['layers'])
    return y, sums

  x, sums = jax.lax.scan(step, x, jnp.arange(2.0))
  return x @ params['head'], sums


def twice(params, x):
  """One stack in two scans."""
  x, _ = jax.lax.scan(summed, x, params['layers'])
  x, sums = jax.lax.scan(summed, x, params['layers'])
  return x @ params['head'], sums


@pytest.mark.parametrize('apply', [backwards, wrapped, over_time, twice])
def test_segments_wherever_the_scan_is(apply):
  rule = ql.per_layer([Q4, Q8, Q8, None])
  recipe = {'/w$': rule, '/v$': Q8}
  model = ql.ptq(apply, PARAMS, recipe, [X])
  # What its weights stand for, on the float function.
  dense = jax.tree.map(
    lambda q: q.dequantize() if isinstance(q, Segments) else q,
    model.params['weights'],
    is_leaf=lambda q: isinstance(q, Segments),
  )
  assert dense['layers']['w'].shape == PARAMS['layers']['w'].shape
  want = apply(dense, X)
  tight = apply is not wrapped
  close(model.apply(model.params, X), want, 1e-5 if tight else 0.1)
  errors = np.abs(dense['layers']['w'] - PARAMS['layers']['w']).max((1, 2))
  assert errors[3] == 0 < errors[1] < errors[0] / 4


def test_a_transformer_of_two_forms():
  """Products of two activations, too, with operands of each layer's rule."""

  def form(scanned):
    return transformer.Transformer(
      vocab=11, dim=8, heads=2, blocks=2, context=6, scanned=scanned
    ).apply

  tokens = np.arange(12).reshape(2, 6) % 11
  one, other = form(True), form(False)
  flat = programs.filled(
    jax.eval_shape(
      transformer.Transformer(11, 8, 2, 2, 6).init, jax.random.key(0), tokens
    )
  )
  params = transformer.stack_blocks(flat)
  scores = ql.rule(lhs=ql.int8(per='token'), rhs=ql.int8(per='token'))
  mine = ql.ptq(
    one,
    params,
    {
      'blocks/.*kernel': ql.per_layer([Q8, Q4]),
      'site:bhts$': ql.per_layer([None, scores]),
    },
    [tokens],
  )
  want = ql.ptq(
    other,
    flat,
    {
      'block_0/.*kernel': Q8,
      'block_1/.*kernel': Q4,
      'site:block_1.*bhts$': scores,
    },
    [tokens],
  )
  close(
    jax.jit(mine.apply)(mine.params, tokens),
    jax.jit(want.apply)(want.params, tokens),
  )
  assert mine.nbytes == want.nbytes
  assert sum(s.rule is not None for s in mine.plan.sites.values()) == 13


# What is refused --------------------------------------------------------------


def no_scan(params, x):
  return x @ params['head']


def nested(params, x):
  def outer(x, p):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p)[0], None

  return jax.lax.scan(outer, x, params['w'])[0]


def shared(params, x):
  def body(x, b):
    return jnp.tanh(x @ params['w']) + b, None

  return jax.lax.scan(body, x, params['b'])[0]


def last_axis(params, x):
  stack = jnp.moveaxis(params['w'], -1, 0)
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


def also_outside(params, x):
  x = jax.lax.scan(summed, x, params['layers'])[0]
  return x @ params['layers']['w'][0]


# Only the use in the scan has a rule for each layer.
OUTSIDE = 'site:w$'


def in_a_branch(params, x):
  def run(x):
    return jax.lax.scan(summed, x, params['layers'])[0]

  return jax.lax.cond(x.sum() > 0, run, lambda x: x, x)


SQUARE = {'w': W(2, 3, DIM, DIM), 'b': W(3, DIM)}


@pytest.mark.parametrize(
  ('apply', 'params', 'pattern', 'count', 'message'),
  [
    (scanned, PARAMS, '/w$', 3, r'3 rules for site .layers/w.*over 4 layers'),
    (no_scan, PARAMS, 'head', 2, 'is in no scan over layers'),
    (nested, SQUARE, 'w', 2, r'nested scans over \(2, 3\) layers'),
    (shared, {**SQUARE, 'w': W(DIM, DIM)}, 'w', 3, 'one weight for all turns'),
    (last_axis, {'w': W(DIM, DIM, 3)}, 'w', 3, 'along axis 2'),
    (also_outside, PARAMS, OUTSIDE, 4, 'reads them outside of it'),
    (in_a_branch, PARAMS, '/w$', 4, "lies inside 'cond'"),
  ],
)
def test_a_rule_by_layer_that_cannot_be(apply, params, pattern, count, message):
  rules = {pattern: ql.per_layer([Q4] * (count - 1) + [Q8])}
  with pytest.raises(ValueError, match=message):
    ql.plan(apply, params, rules, X)


def test_wrong_arguments_are_named():
  with pytest.raises(ValueError, match='a rule for each layer, got none'):
    ql.per_layer([])
  with pytest.raises(TypeError, match='a list with a rule for each layer'):
    ql.per_layer(Q4)
  with pytest.raises(TypeError, match=r"layer 1 in per_layer .* got 'int4'"):
    ql.per_layer([Q4, 'int4'])
  model = ql.ptq(scanned, PARAMS, {'/w$': ql.per_layer([Q4, Q8, Q8, Q8])}, [X])
  with pytest.raises(TypeError, match='pass the plan of their model'):
    ql.quantized(scanned)(model.params, X)
  with pytest.raises(TypeError, match='planned as int4'):
    model.apply(PARAMS, X)
