"""Sensitivity: against exact Hessians, and against models that are deployed."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph import programs
from jax import lax
from oracle import snap

import quantlab as ql
from quantlab import quality, search
from quantlab.search.simulate import Options

W = programs.Random(5)
PARAMS = {'a': W(4, 5, scale=0.9), 'b': W(5, 3, scale=0.9)}
XS = [W(6, 4, scale=1.0) for _ in range(3)]
WIDTHS = (2, 3, 4)


def mlp(params, x):
  return jnp.tanh(x @ params['a']) @ params['b']


# The labels that the model gives: the Hessian is that of a trained one.
BATCHES = [(x, np.asarray(mlp(PARAMS, x).argmax(-1))) for x in XS]


def loss_of(a, b, shift, x, y, reduce=jnp.mean):
  """Cross-entropy with `shift` added to the hidden layer."""
  logits = (jnp.tanh(x @ a) + shift) @ b
  log_p = jax.nn.log_softmax(logits)
  return reduce(-log_p[jnp.arange(len(y)), y])


@pytest.fixture(scope='module')
def tables():
  formats = [ql.int2(), ql.int3(), ql.int4()]
  return ql.sensitivity(
    mlp,
    PARAMS,
    {'': formats},
    BATCHES,
    ('loss', 'weight_error', 'fisher', 'hessian', 'trace', 'eigenvalue', 'kl'),
    task=quality.classification,
    interactions=True,
    probes=100,
    iterations=100,
    tolerance=1e-7,
  )


def errors():
  """Q(w) - w of every option, by the NumPy definition."""
  return [
    np.asarray(snap.symmetric(PARAMS[k], 0, b)) - np.asarray(PARAMS[k])
    for k in ('a', 'b')
    for b in WIDTHS
  ]


@pytest.fixture(scope='module')
def exact():
  """Mean Hessian over all weights, (35, 35), and the gradients by example."""

  def losses(flat, x, y):
    a, b = flat[:20].reshape(4, 5), flat[20:].reshape(5, 3)
    return loss_of(a, b, 0.0, x, y, lambda per_example: per_example)

  flat = jnp.concatenate([PARAMS['a'].reshape(-1), PARAMS['b'].reshape(-1)])
  hessian = jax.jit(jax.hessian(lambda *args: losses(*args).mean()))
  rows = jax.jit(jax.jacobian(losses))
  h = [hessian(flat, x, y) for x, y in BATCHES]
  return np.mean(h, 0), np.concatenate([rows(flat, x, y) for x, y in BATCHES])


def as_flat(k, d):
  out = np.zeros(35)
  if k < len(WIDTHS):
    out[:20] = d.reshape(-1)
  else:
    out[20:] = d.reshape(-1)
  return out


def test_second_order_is_that_of_the_exact_hessian(tables, exact):
  h, gradients = exact
  d = [as_flat(k, e) for k, e in enumerate(errors())]
  flat = {n: np.concatenate(t.values) for n, t in tables.items()}
  for k, e in enumerate(d):
    close = {'rtol': 2e-4, 'atol': 1e-7}
    taylor = gradients.mean(0) @ e + e @ h @ e / 2
    np.testing.assert_allclose(flat['hessian'][k], taylor, **close)
    fisher = np.mean((gradients @ e) ** 2) / 2
    np.testing.assert_allclose(flat['fisher'][k], fisher, **close)
    np.testing.assert_allclose(flat['weight_error'][k], e @ e, **close)
  q = tables['hessian'].interactions
  for i, j in itertools.product(range(6), repeat=2):
    same = (i < 3) == (j < 3)
    want = 0 if same else d[i] @ h @ d[j]
    np.testing.assert_allclose(q[i, j], want, rtol=2e-4, atol=1e-6)


def test_direct_interactions_are_those_of_the_responses(tables):
  a, b = (np.asarray(PARAMS[k], float) for k in ('a', 'b'))
  errors_of = errors()
  total = np.zeros((6, 6))
  for x in map(np.asarray, XS):
    z = np.tanh(x @ a) @ b
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    u = [np.tanh(x @ (a + e)) @ b - z for e in errors_of[:3]]
    u += [np.tanh(x @ a) @ e for e in errors_of[3:]]
    for i, j in itertools.product(range(6), repeat=2):
      inner = (p * u[i] * u[j]).sum(-1)
      outer = (p * u[i]).sum(-1) * (p * u[j]).sum(-1)
      total[i, j] += (inner - outer).mean() / len(XS)
  total *= np.kron(1 - np.eye(2), np.ones((3, 3)))
  for name in ('kl', 'loss'):
    q = tables[name].interactions
    np.testing.assert_allclose(q, total, rtol=2e-4, atol=1e-6)
    assert 0 < tables[name].facts['interactions']['stderr'] < np.abs(q).max()
  assert tables['fisher'].interactions is None


def test_interactions_explain_what_sums_leave_out(tables):
  """Of every pair of options, the joint divergence of the real model."""
  table, joint, sums, whole = tables['kl'], [], [], []
  for choice in itertools.product(range(1, 3), repeat=2):
    deltas = errors()
    moved = {
      'a': PARAMS['a'] + deltas[choice[0]],
      'b': PARAMS['b'] + deltas[3 + choice[1]],
    }
    found = [
      jax.nn.log_softmax(mlp(PARAMS, x)) - jax.nn.log_softmax(mlp(moved, x))
      for x in XS
    ]
    p = [jax.nn.softmax(mlp(PARAMS, x)) for x in XS]
    joint.append(
      np.mean([(q * d).sum(-1) for q, d in zip(p, found, strict=True)])
    )
    sums.append(search.additive(table).predict(choice))
    whole.append(table.predict(choice))
  off = [np.abs(np.subtract(x, joint)).mean() for x in (whole, sums)]
  assert off[0] < 0.5 * off[1]


def test_traces_and_eigenvalues_are_those_of_the_exact_hessian(tables, exact):
  h, _ = exact
  d = errors()
  trace, eigenvalue = tables['trace'], tables['eigenvalue']
  for row, block in enumerate((slice(0, 20), slice(20, 35))):
    trace_of, n = np.trace(h[block, block]), block.stop - block.start
    mean, error = trace.values[row], trace.stderr[row]
    want = [trace_of / n * np.square(e).sum() for e in d[3 * row : 3 * row + 3]]
    # Its own standard error says how far off it may be, and is small.
    np.testing.assert_array_less(np.abs(mean - want), 4 * error)
    facts = list(trace.facts['traces'].values())[row]
    off = abs(facts['value'] - trace_of)
    assert off < min(4 * facts['stderr'], 0.25 * trace_of)
    assert facts['n'] == n
    values = np.linalg.eigvalsh(h[block, block])
    top = values[np.abs(values).argmax()]
    found = list(eigenvalue.facts['eigenvalues'].values())[row]
    assert found['value'] == pytest.approx(top, rel=1e-3)
    assert found['residual'] < 0.05 * abs(top)
    want = [top * np.square(e).sum() for e in d[3 * row : 3 * row + 3]]
    np.testing.assert_allclose(eigenvalue.values[row], want, rtol=2e-3)


def test_direct_metrics_are_those_of_the_deployed_model(tables):
  for row, name in enumerate(('a', 'b')):
    for k, make in enumerate((ql.int2, ql.int3, ql.int4)):
      model = ql.ptq(mlp, PARAMS, {f'^/{name}$': make()}, XS)
      found = quality.assess(
        mlp, PARAMS, model.apply, model.params, BATCHES, quality.classification
      )
      kl = found['contrast']['kl_mean']
      got = tables['kl'].values[row][k], tables['kl'].stderr[row][k]
      np.testing.assert_allclose(got, (kl.value, kl.stderr), rtol=1e-3)
      change = (
        found['quality']['cross_entropy'].value
        - found['reference']['cross_entropy'].value
      )
      assert tables['loss'].values[row][k] == pytest.approx(change, abs=1e-5)


def test_encoded_weights_take_the_place_of_rounded_ones(tables):
  choices = {'/a': [ql.int2(), None, ql.int4()], '/b': [ql.int3(), ql.int4()]}

  def measured(encode):
    return ql.sensitivity(
      mlp,
      PARAMS,
      choices,
      BATCHES,
      'kl',
      task=quality.classification,
      encode=encode,
      interactions=True,
    )

  table = measured(ql.rtn())
  want = tables['kl']
  a, b = table.values
  np.testing.assert_allclose(
    [a[0], a[2], *b], [*want.values[0][::2], *want.values[1][1:]], rtol=1e-3
  )
  assert a[1] == 0
  np.testing.assert_allclose(
    table.interactions[0, 3], want.interactions[0, 4], rtol=1e-3
  )
  with pytest.raises(ValueError, match='expand the errors of rounding'):
    ql.sensitivity(
      mlp,
      PARAMS,
      choices,
      BATCHES,
      'hessian',
      task=quality.classification,
      encode=ql.rtn(),
    )


def test_activations_have_a_second_order_too():
  table = ql.sensitivity(
    mlp,
    PARAMS,
    {'/b': [ql.rule(input=ql.int3(per='token')), ql.int3()], '/a': ql.int8()},
    BATCHES,
    'hessian',
    task=quality.classification,
    interactions=True,
  )

  def along(t, x, y, d):
    return loss_of(PARAMS['a'], PARAMS['b'], t * d, x, y)

  first = jax.jit(jax.grad(along))
  second = jax.jit(jax.grad(jax.grad(along)))
  taylor = []
  for x, y in BATCHES:
    hidden = jnp.tanh(x @ PARAMS['a'])
    d = jnp.asarray(snap.symmetric(hidden, 1, 3)) - hidden

    taylor.append(first(0.0, x, y, d) + second(0.0, x, y, d) / 2)
  assert table.values[0][0] == pytest.approx(np.mean(taylor), rel=1e-3)
  trace = ql.sensitivity(
    mlp,
    PARAMS,
    {'/b': [ql.rule(input=ql.int3(per='token')), None]},
    BATCHES,
    'trace',
    task=quality.classification,
    probes=100,
  )
  exact, sizes = [], []

  @jax.jit
  @jax.hessian
  def moved(shift, x, y):
    return loss_of(PARAMS['a'], PARAMS['b'], shift, x, y, jnp.sum)

  for x, y in BATCHES:
    hidden = jnp.tanh(x @ PARAMS['a'])
    h = moved(jnp.zeros((6, 5)), x, y).reshape(30, 30)
    exact.append(jnp.trace(h) / 6)
    sizes.append(np.square(snap.symmetric(hidden, 1, 3) - hidden).sum() / 6)
  want = np.mean(exact) / 5 * np.mean(sizes)
  assert abs(trace.values[0][0] - want) < 4 * trace.stderr[0][0]
  assert trace.values[0][1] == 0
  with pytest.raises(ValueError, match='of weights alone'):
    ql.sensitivity(
      mlp,
      PARAMS,
      {'/b': [ql.rule(input=ql.int3(per='token')), None]},
      BATCHES,
      'eigenvalue',
      task=quality.classification,
    )


STATIC = {'per': 'tensor', 'static': True, 'symmetric': False}


def stacked(params, x):
  h, _ = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params['stack'])
  return (h @ params['e']) @ params['e'].T


STACK = {'stack': W(3, 6, 6, scale=0.7), 'e': W(6, 4, scale=0.7)}
STACK_XS = [W(5, 6, scale=1.0), W(3, 6, scale=1.0)]
STACK_RULES = {
  'stack': [
    ql.rule(weight=ql.int3(group=3, symmetric=False), input=ql.int4(**STATIC)),
    ql.rule(weight=ql.int6(group=3, symmetric=False), input=ql.int8(**STATIC)),
    ql.rule(weight=ql.nf4(group=6)),
    None,
  ],
  'e': [ql.int2(), ql.fp8_e4m3(), ql.int8()],
}


def test_any_option_in_loops_and_ties_is_what_is_deployed():
  """Formats of several kinds, static ranges, a tied and a stacked weight."""
  table = ql.sensitivity(
    stacked, STACK, STACK_RULES, STACK_XS, 'output_mse', costs={}
  )
  assert [r.sites for r in table.rows] == [('stack',), ('e', 'e:1')]
  found = search.space(stacked, STACK, STACK_RULES, STACK_XS[0])
  program = search.Program(stacked, STACK, found, STACK_XS)
  run = jax.jit(
    lambda state, x: program.simulated()(program.variables(STACK, state), x)
  )
  for choice in ((1, 0), (2, 1), (0, 2)):
    made = search.Allocation(table, choice, 'by hand', {})
    model = ql.ptq(stacked, STACK, made, STACK_XS)
    [x, _] = STACK_XS
    got = run(program.bits(program.choice(choice)), x)
    want = model.apply(model.params, x)
    # A tie of rounding may fall to the other side.
    assert np.mean(np.abs(got - want)) < 2e-3 * np.abs(want).max()
    assert made.costs['bytes'] == model.nbytes
  assert run._cache_size() == 1


def test_a_stack_is_its_layers_tied():
  def unrolled(params, x):
    for w in params['w']:
      x = jnp.tanh(x @ w)
    return (x @ params['e']) @ params['e'].T

  layers = {'w': list(STACK['stack']), 'e': STACK['e']}
  rules = [ql.rule(weight=ql.int3(), input=ql.int4(per='token')), ql.int4()]
  metrics = ('kl', 'hessian', 'weight_error')
  a = ql.sensitivity(
    stacked, STACK, {'stack': rules}, STACK_XS[:1], metrics, of='kl'
  )
  b = ql.sensitivity(
    unrolled, layers, {'w/': rules}, STACK_XS[:1], metrics, of='kl', ties=['w/']
  )
  assert b['kl'].rows[0].sites == ('w/0', 'w/1', 'w/2')
  for name in metrics:
    np.testing.assert_allclose(
      a[name].values[0], b[name].values[0], rtol=1e-3, atol=1e-7
    )


def test_one_compilation_serves_all_options_and_rows():
  def traces(count):
    seen = []

    def apply(params, x):
      seen.append(1)
      return mlp(params, x)

    formats = [ql.int2(), ql.int3(), ql.int4(), ql.int6(), ql.int8()]
    ql.sensitivity(apply, PARAMS, {'': formats[:count]}, XS[:1], 'kl')
    return len(seen)

  few, many = traces(2), traces(5)
  # Each further option is planned, from shapes; it is not compiled.
  assert many - few == 0


@pytest.mark.parametrize('per', [{}, {'group': 3, 'ragged': True}])
def test_traced_widths_are_the_static_formats(per):
  formats = [ql.int2, ql.int3, ql.int4, ql.int6, ql.int8]
  x = W(8, 5)
  options = Options({('s', 'weight'): (*(f(**per) for f in formats), None)})

  @jax.jit
  def run(index):
    return options(
      's', 'weight', x, None, {'bits': index}, axis=-2, shape=x.shape
    )

  for k, make in enumerate(formats):
    want = ql.core.fake_quantize(x, make(**per))
    np.testing.assert_allclose(run(k), want, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(run(5), x)
  assert run._cache_size() == 1


def test_a_base_is_where_a_table_starts():
  """Values are changes of the divergence from float, not from the base."""
  formats = [ql.int2(), ql.int3(), ql.int8()]
  table = ql.sensitivity(mlp, PARAMS, {'': formats}, XS, 'kl', base='int3')

  def kl(*made):
    model = ql.ptq(mlp, PARAMS, dict(zip(('a', 'b'), made, strict=True)), XS)
    found = quality.compare(mlp, PARAMS, model.apply, model.params, XS)
    return found['kl_mean'].value

  start = formats[1]
  for k, made in enumerate(formats):
    change = kl(made, start) - kl(start, start)
    assert table.values[0][k] == pytest.approx(change, abs=1e-6)
  assert table.values[0][1] == 0
  assert table.values[0][2] < 0 < table.values[0][0]


def test_ties():
  formats = [ql.int2(), ql.int8()]
  tied = ql.sensitivity(mlp, PARAMS, {'': formats}, XS, 'kl', ties=[('a', 'b')])
  assert [r.sites for r in tied.rows] == [('a', 'b')]
  model = ql.ptq(mlp, PARAMS, {'': ql.int2()}, XS)
  want = quality.compare(mlp, PARAMS, model.apply, model.params, XS)
  assert tied.values[0][0] == pytest.approx(want['kl_mean'].value, rel=1e-3)


def bn_net(params, x):
  for i in range(2):
    p = params[f'l{i}']
    y = x @ p['w'] + p['c']
    y = (y - p['mean']) * (p['gamma'] / jnp.sqrt(p['var'] + 1e-3)) + p['beta']
    x = jax.nn.relu(y)
  return x @ params['head']


def bn_params():
  r = programs.Random(8)

  def layer(k, n):
    return {
      'w': r(k, n),
      'c': r(n),
      'mean': r(n),
      'gamma': 1 + r(n) ** 2,
      'var': 0.3 + r(n) ** 2,
      'beta': r(n),
    }

  return {'l0': layer(4, 6), 'l1': layer(6, 5), 'head': r(5, 3)}


def test_statistics_of_batch_norms_are_found_by_dataflow():
  params = bn_params()
  found = search.batch_norms(bn_net, params, W(2, 4))
  assert list(found) == ['l0/w', 'l1/w']
  for i, (mean, std) in enumerate(found.values()):
    p = params[f'l{i}']
    np.testing.assert_allclose(mean, p['mean'] - p['c'], rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(std, np.sqrt(p['var'] + 1e-3), rtol=2e-3)


def test_distilled_data_have_the_statistics():
  params = bn_params()
  like = jax.ShapeDtypeStruct((64, 4), jnp.float32)
  x, losses = search.distill(bn_net, params, like, jax.random.key(0), steps=200)
  assert losses[-1] < losses[0] / 3
  p = params['l0']
  std = (x @ p['w'] + p['c']).std(0)
  start = jax.random.normal(jax.random.key(0), (64, 4))
  before = (start @ p['w'] + p['c']).std(0)
  wanted = np.sqrt(p['var'] + 1e-3)
  assert np.abs(std - wanted).mean() < np.abs(before - wanted).mean()
  with pytest.raises(ValueError, match='no product is followed by a BatchNorm'):
    search.distill(mlp, PARAMS, like, jax.random.key(0))


def test_a_batch_norm_of_a_float_site_is_kept_and_counted():
  params = bn_params()
  choices = {'w': [ql.int4(), None], 'head': ql.int8()}
  xs = [W(4, 4)]
  found = search.space(bn_net, params, choices, *xs)
  table = ql.sensitivity(bn_net, params, choices, xs, 'weight_error')
  assert found.plan.folded
  for choice in ((0, 1), (1, 0)):
    made = search.Allocation(table, choice, 'by hand', {})
    model = ql.ptq(bn_net, params, made, xs)
    assert made.costs['bytes'] == model.nbytes


def test_what_cannot_be_is_said():
  choices = {'': [ql.int2(), ql.int8()]}
  with pytest.raises(ValueError, match="unknown metric 'hesse'"):
    ql.sensitivity(mlp, PARAMS, choices, XS, 'hesse')
  with pytest.raises(ValueError, match="task 'unlabelled' has no 'loss'"):
    ql.sensitivity(mlp, PARAMS, choices, XS, 'loss')
  with pytest.raises(ValueError, match='no derivative'):
    ql.sensitivity(mlp, PARAMS, choices, XS, 'hessian', of='sqnr')
  with pytest.raises(ValueError, match='no batch'):
    ql.sensitivity(mlp, PARAMS, choices, [])
  with pytest.raises(ValueError, match='search space is empty'):
    ql.sensitivity(mlp, PARAMS, {}, XS)
  with pytest.raises(ValueError, match='nothing to choose'):
    ql.sensitivity(mlp, PARAMS, {'': ql.int2()}, XS)
  with pytest.raises(ValueError, match='has no options'):
    ql.sensitivity(mlp, PARAMS, {'': []}, XS)
  with pytest.raises(ValueError, match='an option twice'):
    ql.sensitivity(mlp, PARAMS, {'': [ql.int2(), ql.int2()]}, XS)
  token, tensor = (ql.rule(input=ql.int8(per=p)) for p in ('token', 'tensor'))
  with pytest.raises(ValueError, match="of site 'a' conflict: its input"):
    ql.sensitivity(mlp, PARAMS, {'': [token, tensor]}, XS)
  unfolded = ql.rule(weight=ql.int2(), fold=False)
  with pytest.raises(ValueError, match='some fold the BatchNorm'):
    ql.sensitivity(mlp, PARAMS, {'': [unfolded, ql.int8()]}, XS)
  other = {'a': [ql.int2(), ql.int8()], 'b': [ql.int3(), ql.int8()]}
  with pytest.raises(ValueError, match=r"same options: 'a' has \['int2'"):
    ql.sensitivity(mlp, PARAMS, other, XS, ties=[('a', 'b')])
  with pytest.raises(ValueError, match="tie 'c' finds no site"):
    ql.sensitivity(mlp, PARAMS, choices, XS, ties=[('a', 'c')])
  with pytest.raises(ValueError, match="has no option 'int4'"):
    ql.sensitivity(mlp, PARAMS, choices, XS, base='int4')
  for name in ('sqnr', 'fisher'):
    with pytest.raises(ValueError, match='start at the float model'):
      ql.sensitivity(mlp, PARAMS, choices, XS, name, base='int2')
  with pytest.raises(ValueError, match='batch 0 has 1 arrays'):
    ql.sensitivity(mlp, PARAMS, choices, XS, task=quality.classification)


def test_what_is_not_finite_is_recorded_and_never_chosen():
  def log(params, x):
    return jnp.log(x @ params['a'])  # 0.1 becomes 0 at two bits

  params = {'a': jnp.array([[1.0, -0.4], [0.1, 1.0]])}
  xs = [jnp.array([[0.0, 1.0], [0.5, 1.0]])]
  table = ql.sensitivity(log, params, {'': [ql.int2(), ql.int8()]}, xs)
  assert np.isnan(table.values[0][0])
  assert ql.allocate(table, 1e6).options == {'a': 'int8'}


def test_an_allocation_and_its_plan_are_what_ptq_and_qat_take():
  choices = {'^/a': [ql.int3(), ql.int8(group=2)], '^/b': ql.int4()}
  table = ql.sensitivity(mlp, PARAMS, choices, XS, 'weight_error')
  found = ql.allocate(table, 60)
  again = search.Allocation.from_json(json.loads(json.dumps(found.to_json())))
  assert again.rules == found.rules
  assert set(found.rules) == {'a', 'b'}
  plan = ql.plan(mlp, PARAMS, found, XS[0])
  plan = ql.Plan.from_json(json.loads(json.dumps(plan.to_json())))
  model = ql.ptq(mlp, PARAMS, plan, XS)
  assert model.plan.to_json() == plan.to_json()
  assert model.nbytes == found.costs['bytes'] <= 60
  trained = ql.qat(mlp, plan)
  got = trained.apply(trained.init(PARAMS, XS), XS[0])
  np.testing.assert_allclose(got, model.apply(model.params, XS[0]), atol=0.05)
  with pytest.raises(ValueError, match=r"rule 'site:\^b\$' decides no site"):
    ql.ptq(lambda p, x: x @ p['a'], PARAMS, found, XS)


@pytest.mark.parametrize('metric', ['kl', 'fisher', 'trace'])
def test_batches_that_can_be_read_once_are_refused(metric):
  params = {'w': jnp.eye(3)}
  once = (x for x in [(jnp.ones((2, 3)),)] * 2)
  with pytest.raises(TypeError, match='read several times'):
    ql.sensitivity(
      lambda p, x: x @ p['w'],
      params,
      {'w': [ql.int4(), ql.int8()]},
      once,
      metric,
    )
