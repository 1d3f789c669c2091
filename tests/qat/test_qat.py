"""Training by a plan: what is trained is what is frozen, on any program."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from graph import programs
from jax import lax

import quantlab as ql
from quantlab.core.tree import named_leaves

E = ql.estimators
R = programs.Random(3)
STATIC = {'per': 'tensor', 'static': True}
W4A8 = ql.rule(weight=ql.int4(), input=ql.int8(**STATIC))


def mlp(p, x):
  return jax.nn.relu(x @ p['a'] + p['c']) @ p['b']


def scanned(p, x):
  def layer(h, w):
    return h + jnp.tanh(h @ w), None

  return lax.scan(layer, x, p['layers'])[0] @ p['head']


def joined(p, x):
  q, k, v = jnp.split(x @ jnp.concatenate([p['q'], p['k'], p['v']], 1), 3, 1)
  return q * jnp.tanh(k) + v


def tied(p, ids):
  h = p['embed'][ids]
  return jnp.tanh(h @ p['w']) @ p['embed'].T


def conv_bn(p, x):
  y = lax.conv_general_dilated(
    x, p['kernel'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
  )
  y = (y - p['mean']) * lax.rsqrt(p['var'] + 1e-5) * p['gain'] + p['shift']
  return jax.nn.relu(y).mean((1, 2)) @ p['head']


MLP = {'a': R(8, 16), 'b': R(16, 4), 'c': R(16)}
CASES = {
  'mlp': (mlp, MLP, R(5, 8)),
  'scan': (scanned, {'layers': R(3, 8, 8), 'head': R(8, 4)}, R(5, 8)),
  'joined': (joined, {k: R(8, 6) for k in 'qkv'}, R(5, 8)),
  'conv': (
    conv_bn,
    {
      'kernel': R(3, 3, 2, 8),
      'mean': R(8),
      'var': 1 + R(8) ** 2,
      'gain': 1 + R(8),
      'shift': R(8),
      'head': R(8, 4),
    },
    R(2, 6, 6, 2),
  ),
}
RULES = {
  'lsq': (W4A8, E.lsq()),
  'lsq+': (
    ql.rule(
      weight=ql.int4(symmetric=False),
      input=ql.int8(symmetric=False, **STATIC),
    ),
    E.lsq(),
  ),
  'pact+dorefa': (
    ql.rule(weight=ql.odd(bits=3), input=ql.uint4(**STATIC)),
    {'weight': E.dorefa(), 'input': E.pact()},
  ),
  'bitnet': (
    ql.rule(weight=ql.ternary(per='tensor'), input=ql.int8(per='token')),
    E.ste(),
  ),
}


def made(case, rule, recipe=None):
  apply, params, x = CASES[case]
  quantizers, estimator = RULES[rule]
  if case == 'conv' and rule == 'bitnet':
    quantizers = ql.rule(weight=ql.ternary(per='tensor'))
  plan = ql.plan(apply, params, recipe or {'': quantizers}, x)
  return ql.qat(apply, plan, estimator), plan, params, x


def trained(train, plan, variables, x, steps=3):
  """Variables after a few steps, so that nothing is where it began."""
  labels = plan.labels(variables)
  optimizer = optax.multi_transform(
    {
      'weight': optax.sgd(0.05),
      'step': optax.sgd(0.01),
      'state': optax.set_to_zero(),
    },
    labels,
  )

  @jax.jit
  def step(v, s):
    g = jax.grad(lambda v: jnp.mean(jnp.square(train.apply(v, x) - 1)))(v)
    u, s = optimizer.update(g, s, v)
    return optax.apply_updates(v, u), s

  state = optimizer.init(variables)
  for _ in range(steps):
    variables, state = step(variables, state)
  return variables


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('case', CASES)
def test_frozen_is_what_was_trained(case, rule):
  train, plan, params, x = made(case, rule)
  start = train.init(params, [x])
  end = trained(train, plan, start, x)
  labels = jax.tree.leaves(plan.labels(end))
  pairs = zip(jax.tree.leaves(start), jax.tree.leaves(end), labels, strict=True)
  for before, after, label in pairs:
    if label == 'state':
      np.testing.assert_array_equal(before, after)
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), start, end)
  assert any(jax.tree.leaves(moved['weights']))
  if 'lsq' in rule:
    steps = [
      m for m, n in zip(
        jax.tree.leaves(moved), labels, strict=True
      ) if n == 'step'
    ]  # fmt: skip
    assert len(steps) >= 2 * len(plan.quantized)
    assert np.mean(steps) > 0.6  # an offset moves where values are clipped
  model = train.freeze(end, x)
  got = jax.jit(model.apply)(model.params, x)
  want = jax.jit(train.apply)(end, x)
  scale = float(jnp.abs(want).max())
  np.testing.assert_allclose(got, want, atol=2e-6 * scale, rtol=1e-5)
  for name, storage in {**plan.leaves, **plan.effective}.items():
    q = dict(named_leaves(model.params))[
      f'effective/{name}' if name in plan.effective else f'weights/{name}'
    ]
    assert q.quantizer == storage.quantizer


@pytest.mark.parametrize('case', ['mlp', 'scan', 'joined'])
def test_training_codes_are_the_frozen_codes(case):
  """Each weight that training multiplies by is the stored one, exactly."""
  train, plan, params, x = made(case, 'lsq')
  end = trained(train, plan, train.init(params, [x]), x)
  model = train.freeze(end, x)
  flat = dict(named_leaves(model.params['weights']))
  for path, storage in plan.leaves.items():
    site, role = plan.weight_roles[path]
    leaves = end['sites'][site][role]
    simulated = storage.on_matrix(
      dict(named_leaves(end['weights']))[path],
      lambda w, s=storage, v=leaves: E.lsq().simulate(w, s.quantizer, v, -2, 1),
    )
    np.testing.assert_array_equal(simulated, flat[path].dequantize())


def test_a_tied_parameter_has_one_step():
  """Looked up and, transposed, multiplied by: one storage, one learned step."""
  params, ids = {'embed': R(12, 8), 'w': R(8, 8)}, jnp.arange(6)
  plan = ql.plan(tied, params, {'': ql.int8()}, ids)
  train = ql.qat(tied, plan, E.lsq())
  variables = train.init(params, [ids])
  assert sorted(variables['sites']) == ['embed', 'w']
  end = trained(train, plan, variables, ids)
  assert (end['sites']['embed']['weight']['step']
          != variables['sites']['embed']['weight']['step']).any()  # fmt: skip
  model = train.freeze(end)
  np.testing.assert_allclose(
    model.apply(model.params, ids), train.apply(end, ids), rtol=1e-5, atol=1e-6
  )


def test_scan_is_the_unrolled_program():
  apply, params, x = CASES['scan']

  def unrolled(p, x):
    for w in p['layers']:
      x = x + jnp.tanh(x @ w)
    return x @ p['head']

  flat = {'layers': list(params['layers']), 'head': params['head']}

  def gradient(f, p):
    plan = ql.plan(f, p, {'': W4A8}, x)
    train = ql.qat(f, plan, E.lsq())
    v = train.init(p, [x])
    return jax.grad(lambda v: jnp.sum(jnp.square(train.apply(v, x))))(v)

  stacked, separate = gradient(apply, params), gradient(unrolled, flat)
  for i in range(3):
    np.testing.assert_allclose(
      stacked['weights']['layers'][i],
      separate['weights']['layers'][i],
      rtol=1e-4,
      atol=1e-4,
    )
    for role in ('weight', 'input'):
      np.testing.assert_allclose(
        stacked['sites']['layers'][role]['step'][i],
        separate['sites'][f'layers/{i}'][role]['step'],
        rtol=1e-4,
        atol=1e-5,
      )


def test_remat_jit_and_cache_change_nothing():
  train, plan, params, x = made('mlp', 'lsq')
  again = ql.qat(jax.checkpoint(jax.jit(mlp)), plan, E.lsq())
  v = train.init(params, [x])
  mlp(params, x)  # the float model first: nothing of it is kept

  def loss(f):
    return jax.value_and_grad(lambda v: jnp.sum(f(v, x) ** 2))

  eager, jitted = loss(train.apply)(v), jax.jit(loss(train.apply))(v)
  rematted = jax.jit(loss(again.apply))(v)
  for other in (jitted, rematted):
    for a, b in zip(
      jax.tree.leaves(eager), jax.tree.leaves(other), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_from_ptq_and_back():
  """A GPTQ model, thawed and frozen again, has the codes it had."""
  apply, params, x = CASES['mlp']
  model = ql.ptq(apply, params, {'': W4A8}, [R(64, 8)], ql.gptq())
  for estimator in (E.lsq(), E.ste()):
    train = ql.qat(apply, model.plan, estimator)
    variables = train.init(model.params, [x])
    back = train.freeze(variables)
    if isinstance(estimator, E.ste):  # finds its scales again: same codes only
      continue
    for a, b in zip(
      jax.tree.leaves(back.params), jax.tree.leaves(model.params), strict=True
    ):
      np.testing.assert_array_equal(a, b)


def test_float_parameters_with_the_ranges_of_a_model():
  apply, params, x = CASES['conv']
  model = ql.ptq(apply, params, {'': W4A8}, [x])
  assert model.plan.dropped  # only effective weights are stored
  train = ql.qat(apply, model.plan, E.lsq())
  with pytest.raises(ValueError, match=r'start=model\.params'):
    train.init(model.params, [x])
  variables = train.init(params, start=model.params)
  back = train.freeze(variables, x)
  for a, b in zip(
    jax.tree.leaves(back.params), jax.tree.leaves(model.params), strict=True
  ):
    np.testing.assert_allclose(a, b, rtol=1e-6)


def test_a_function_in_training_mode_shares_the_variables():
  """Live batch statistics beside a plan that folds none of them."""
  _, params, x = CASES['conv']

  def live(p, x):
    y = lax.conv_general_dilated(
      x, p['kernel'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
    y = (y - mean) * lax.rsqrt(var + 1e-5) * p['gain'] + p['shift']
    return jax.nn.relu(y).mean((1, 2)) @ p['head'], (mean, var)

  rule = ql.rule(weight=ql.int4(), input=ql.int8(**STATIC), fold=False)
  plan = ql.plan(conv_bn, params, {'': rule}, x)
  train = ql.qat(conv_bn, plan, E.lsq())
  in_training = ql.qat(live, plan, E.lsq()).apply
  variables = train.init(params, [x])
  _, (mean, var) = in_training(variables, x)
  weights = {**variables['weights'], 'mean': mean, 'var': var}
  same = train.apply({**variables, 'weights': weights}, x)
  np.testing.assert_allclose(in_training(variables, x)[0], same, rtol=1e-5)
  model = train.freeze(variables, x)
  assert 'kernel' in model.plan.leaves


def test_one_program_for_every_width():
  train, _, params, x = made('mlp', 'lsq')
  variables = train.init(params, [x])
  count = 0

  @jax.jit
  def run(v):
    nonlocal count
    count += 1
    return train.apply(v, x)

  def with_bits(b):
    sites = {
      k: {r: {**v, 'bits': jnp.int32(b)} for r, v in s.items()}
      for k, s in variables['sites'].items()
    }
    return {**variables, 'sites': sites}

  outs = [run(with_bits(b)) for b in (2, 3, 4)]
  assert count == 1
  assert all((a != b).any() for a, b in itertools.pairwise(outs))
  eight = {k: {**s, 'input': {**s['input'], 'bits': jnp.int32(8)}}
           for k, s in variables['sites'].items()}  # fmt: skip
  np.testing.assert_array_equal(
    train.apply({**variables, 'sites': eight}, x), train.apply(variables, x)
  )


def test_training_begins_within_a_trace_too():
  """Shapes of the variables, such as to restore them, without computing."""
  train, _, params, _ = made('scan', 'bitnet')
  variables = train.init(params)
  shapes = jax.eval_shape(train.init, params)
  assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
  jax.tree.map(
    np.testing.assert_array_equal, jax.jit(train.init)(params), variables
  )


def test_strength_moves_and_freezing_waits_for_it():
  apply, params, x = CASES['scan']
  plan = ql.plan(apply, params, {'': RULES['bitnet'][0]}, x)
  train = ql.qat(apply, plan, E.warm_up(E.ste()))
  variables = train.init(params)
  shape = variables['sites']['layers']['weight']['strength'].shape
  assert shape == (3, 1, 1)
  np.testing.assert_allclose(train.apply(variables, x), apply(params, x))
  with pytest.raises(ValueError, match='not fully set in: the strength'):
    train.freeze(ql.set_leaves(variables, 'strength', 0.5))
  end = ql.set_leaves(variables, 'strength', 1.0)
  model = train.freeze(end)
  np.testing.assert_allclose(
    model.apply(model.params, x), train.apply(end, x), rtol=1e-5, atol=1e-6
  )


# Bad input -------------------------------------------------------------------


def test_an_estimator_that_does_not_fit_is_refused():
  apply, params, x = CASES['mlp']

  def attempt(rule, estimator):
    ql.qat(apply, ql.plan(apply, params, {'': rule}, x), estimator)

  dynamic = ql.rule(weight=ql.int4(), input=ql.int8(per='token'))
  with pytest.raises(ValueError, match=r"lsq\(\) learns .*site 'a'.*static"):
    attempt(dynamic, E.lsq())
  with pytest.raises(ValueError, match=r'dorefa\(\) is for weights'):
    attempt(W4A8, E.dorefa())
  with pytest.raises(ValueError, match='float32 ranges'):
    attempt(ql.int4(scale_format='bfloat16'), E.lsq())
  with pytest.raises(ValueError, match='in steps of a uniform format'):
    attempt(ql.nf4(group=8), E.ewgs(inner=E.ste()))
  with pytest.raises(ValueError, match='has a zero point'):
    attempt(
      ql.rule(weight=ql.int4(), input=ql.uint4(symmetric=False, **STATIC)),
      {'input': E.pact()},
    )
  with pytest.raises(ValueError, match=r"unknown roles \['inputs'\]"):
    attempt(W4A8, {'inputs': E.pact()})
  with pytest.raises(TypeError, match='no estimators'):
    attempt(W4A8, {'input': 'pact'})
  with pytest.raises(TypeError, match=r'ql.estimators.lsq\(\)'):
    attempt(W4A8, 'lsq')
  with pytest.raises(TypeError, match=r'what ql.plan'):
    ql.qat(apply, {'': W4A8}, E.lsq())


def test_a_plan_of_another_model_is_refused_with_the_sites():
  apply, params, x = CASES['mlp']
  plan = ql.plan(apply, params, {'': W4A8}, x)

  def other(p, x):
    return x @ p['a'] @ p['z']

  train = ql.qat(other, plan, E.lsq())
  with pytest.raises(ValueError, match=r"lacks: \['b'\].*know: \['z'\]"):
    train.init({'a': params['a'], 'z': params['b']}, [x])
  wider = {**params, 'a': R(8, 24), 'b': R(24, 4), 'c': R(24)}
  with pytest.raises(ValueError, match=r'other shapes: .*\(8, 24\)'):
    ql.qat(apply, plan, E.lsq()).init(wider, [x])


def test_missing_calibration_and_leaves_are_named():
  train, _, params, x = made('mlp', 'lsq')
  with pytest.raises(ValueError, match=r'init\(params, batches\)'):
    train.init(params)
  variables = train.init(params, [x])
  with pytest.raises(ValueError, match='no site has a leaf'):
    ql.set_leaves(variables, 'strength', 1.0)
  without = {**variables, 'sites': {'a': variables['sites']['a']}}
  with pytest.raises(ValueError, match=r"site 'b'.*init\(params, batches\)"):
    train.apply(without, x)
  bad = jax.tree.map(jnp.asarray, variables)
  bad['weights']['a'] = bad['weights']['a'].at[0, 0].set(jnp.nan)
  with pytest.raises(ValueError, match='NaN or infinity: weights/a'):
    train.freeze(bad)
  with pytest.raises(ValueError, match='NaN or infinity: a'):
    train.init(bad['weights'], [x])
  bad = ql.set_leaves(variables, 'step', jnp.nan)
  with pytest.raises(ValueError, match='NaN or infinity: sites/'):
    train.freeze(bad)
  folds, _, p, image = made('conv', 'lsq')
  with pytest.raises(ValueError, match='an example of the'):
    folds.freeze(folds.init(p, [image]))


def test_what_is_no_variables_or_another_models_is_told():
  train, plan, params, x = made('mlp', 'lsq')
  variables = train.init(params, [x])
  with pytest.raises(TypeError, match='freeze takes the variables that init'):
    train.freeze(params)
  with pytest.raises(TypeError, match='labels takes the variables that init'):
    plan.labels(params)
  with pytest.raises(ValueError, match='has leaves of training'):
    train.init(variables, [x])
  with pytest.raises(ValueError, match='has leaves of training'):
    train.init(params, [x], start=variables)
  wider = {**params, 'a': R(9, 24)}
  with pytest.raises(ValueError, match=r"of another model.*'a'.*\(9, 24\)"):
    train.freeze({**variables, 'weights': wider})


def test_estimators_out_of_place():
  apply, params, x = CASES['mlp']
  plan = ql.plan(apply, params, {'': W4A8}, x)
  with pytest.raises(ValueError, match=r'pact.* is for activations'):
    ql.qat(apply, plan, E.pact())
  with pytest.raises(TypeError, match='takes an estimator such as lsq'):
    E.warm_up(E.lsq)
  with pytest.raises(ValueError, match='delta >= 0'):
    E.ewgs(delta=-1.0)
