"""What must not change a result: how, where, in what order it is computed."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import snap

import quantlab as ql

pytestmark = pytest.mark.as_for_users

W8A8 = ql.rule(weight=ql.int8(), input=ql.int8(per='token'))


def layer(p, x):
  return x + jnp.tanh(x @ p['a']) @ p['b']


def unrolled(params, x):
  for i in range(3):
    x = layer(jax.tree.map(lambda w, i=i: w[i], params), x)
  return x


def scanned(params, x, remat=False):
  one = jax.checkpoint(layer) if remat else layer
  return jax.lax.scan(lambda x, p: (one(p, x), None), x, params)[0]


STACKED = {'a': normal(0, 3, 8, 8), 'b': normal(1, 3, 8, 8)}
X = normal(2, 4, 8)


@pytest.fixture(scope='module')
def deep():
  return ql.ptq(scanned, STACKED, {'': W8A8}, [X])


def same_products(got, want):
  """Equal but for the order of sums: a tie of 8 bits may fall elsewhere."""
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


# One program, written in several ways ----------------------------------------


def test_scan_is_the_unrolled_loop(deep):
  flat = [jax.tree.map(lambda w, i=i: w[i], STACKED) for i in range(3)]

  def loop(params, x):
    for p in params:
      x = layer(p, x)
    return x

  other = ql.ptq(loop, flat, {'': W8A8}, [X])
  same_products(deep.apply(deep.params, X), other.apply(other.params, X))
  stored = deep.params['weights']['a']
  for i in range(3):
    one = other.params['weights'][i]['a']
    np.testing.assert_array_equal(stored.codes[i], one.codes)
    np.testing.assert_array_equal(stored.scale[i], one.scale)


def test_layers_indexed_out_of_a_stack(deep):
  other = ql.ptq(unrolled, STACKED, {'': W8A8}, [X])
  same_products(deep.apply(deep.params, X), other.apply(other.params, X))
  for path in 'ab':
    a, b = deep.params['weights'][path], other.params['weights'][path]
    np.testing.assert_array_equal(a.codes, b.codes)
  assert len(other.plan.sites) == 6


def test_remat_changes_nothing(deep):
  def remat(params, x):
    return scanned(params, x, remat=True)

  other = ql.ptq(remat, STACKED, {'': W8A8}, [X])
  same_products(deep.apply(deep.params, X), other.apply(other.params, X))

  def gradients(apply, plan):
    simulated = ql.fake_quantized(apply, plan)
    return jax.grad(lambda p: jnp.sum(simulated(p, X) ** 2))(STACKED)

  a, b = gradients(scanned, deep.plan), gradients(remat, other.plan)
  jax.tree.map(same_products, a, b)


def test_transposed_storage():
  w = normal(0, 8, 6)
  plain = ql.ptq(lambda p, x: x @ p['w'], {'w': w}, {'': W8A8}, [X])
  turned = ql.ptq(lambda p, x: x @ p['w'].T, {'w': w.T}, {'': W8A8}, [X])
  a, b = plain.params['weights']['w'], turned.params['weights']['w']
  np.testing.assert_array_equal(a.codes, b.codes)  # one canonical layout
  np.testing.assert_array_equal(a.dequantize(), b.dequantize().T)
  np.testing.assert_array_equal(
    plain.apply(plain.params, X), turned.apply(turned.params, X)
  )


# One program, run in several ways --------------------------------------------


def test_jit_is_eager(deep):
  eager = deep.apply(deep.params, X)
  np.testing.assert_array_equal(jax.jit(deep.apply)(deep.params, X), eager)


@pytest.mark.parametrize('order', [(4, 6), (6, 4)])
def test_call_order_and_batch_shapes(deep, order):
  fresh = ql.quantized(scanned, deep.plan)
  run = jax.jit(fresh)
  for batch in order:
    x = normal(batch, batch, 8)
    want = ql.quantized(scanned, deep.plan)(deep.params, x)
    for _ in range(2):  # cold, then warm
      np.testing.assert_array_equal(fresh(deep.params, x), want)
      np.testing.assert_array_equal(run(deep.params, x), want)


def test_python_flags_stay_python_values():
  def apply(params, x, flag, *, scale=1.0):
    assert isinstance(flag, bool | int)
    y = x @ params['w']
    return (-y if flag is True else y) * scale

  params = {'w': normal(0, 8, 8)}
  plan = ql.plan(apply, params, {'': ql.int8()}, X, True)
  run = ql.fake_quantized(apply, plan)
  y = X @ snap.symmetric(params['w'], 0)
  for flag, scale, want in (
    (True, 1.0, -y),
    (1, 1.0, y),  # 1 == True, and their hashes agree
    (True, 2.0, -2 * y),
    (1, -0.0, y * -0.0),
    (1, 0.0, y * 0.0),
  ):
    got = run(params, X, flag, scale=scale)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.signbit(got), np.signbit(want))


def test_arguments_that_cannot_be_hashed():
  class Options(list):
    __hash__ = None

  jax.tree_util.register_pytree_node(
    Options, lambda o: ((), tuple(o)), lambda aux, _: Options(aux)
  )

  def apply(params, x, names):
    return (x @ params['w']) * len(names)

  params = {'w': normal(0, 8, 8)}
  plan = ql.plan(apply, params, {'': ql.int8()}, X, Options(['a', 'b']))
  run = ql.fake_quantized(apply, plan)
  one, two = run(params, X, Options(['a'])), run(params, X, Options(['a', 'b']))
  np.testing.assert_allclose(2 * one, two, rtol=1e-6)


def test_parameters_that_are_no_arrays():
  def apply(params, x):
    return params['act'](x @ params['w']) * params['gain']

  params = {'w': normal(0, 8, 8), 'act': jnp.tanh, 'gain': 2.0, 'none': None}
  model = ql.ptq(apply, params, {'w': ql.int8()}, [X])
  want = 2 * np.tanh(X @ snap.symmetric(params['w'], 0))
  np.testing.assert_allclose(
    model.apply(model.params, X), want, rtol=1e-5, atol=1e-6
  )


def test_vmap_over_models_and_inputs(deep):
  other = ql.ptq(
    scanned, jax.tree.map(lambda w: w * 1.5, STACKED), {'': W8A8}, [X]
  )
  both = jax.tree.map(lambda *p: jnp.stack(p), deep.params, other.params)
  out = jax.vmap(deep.apply, in_axes=(0, None))(both, X)
  same_products(out[0], deep.apply(deep.params, X))
  same_products(out[1], other.apply(other.params, X))
  # A token has its own scale: a batch of one token at a time is the batch.
  rows = jax.vmap(deep.apply, in_axes=(None, 0))(deep.params, X[:, None])
  same_products(rows[:, 0], deep.apply(deep.params, X))


def test_sharded_is_unsharded(deep):
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ('data', 'model'))

  def put(x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))

  sharded = {k: put(w, None, None, 'model') for k, w in STACKED.items()}
  x = put(X, 'data', None)
  model = ql.ptq(scanned, sharded, {'': W8A8}, [x])
  for path in 'ab':
    a = deep.params['weights'][path]
    b = model.params['weights'][path]
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(a.scale, b.scale)
    assert len(b.codes.sharding.device_set) == 8
  same_products(
    jax.jit(model.apply)(model.params, x), deep.apply(deep.params, X)
  )


def test_inside_shard_map(deep):
  mesh = Mesh(np.array(jax.devices()[:4]), ('data',))
  run = jax.jit(
    jax.shard_map(
      deep.apply, mesh=mesh, in_specs=(P(), P('data')), out_specs=P('data')
    )
  )
  same_products(run(deep.params, X), deep.apply(deep.params, X))


def gained(p, x):
  """A float parameter between products, some of it in calls and loops."""
  y = jax.jit(lambda y, g: jnp.tanh(y) * g)(x @ p['a'], p['g'])
  step = lambda y, h: (jax.nn.relu(y * h) @ p['b'] + h, None)  # noqa: E731
  return jax.lax.scan(step, y, p['h'])[0] - 1


GAINED = {
  'a': normal(3, 8, 8),
  'b': normal(4, 8, 8) / 2,
  'g': normal(5, 8),
  'h': normal(6, 2, 8),
}


@pytest.mark.parametrize('kind', ['float', 'integer', 'simulated', 'training'])
def test_gradients_inside_shard_map(kind):
  """Of parameters that all devices share; shard_map sums what each finds."""
  model = ql.ptq(gained, GAINED, {'': W8A8}, [X])
  apply, params = {
    'float': (gained, GAINED),
    'integer': (model.apply, model.params),
    'simulated': (
      ql.quantized(gained, model.plan, integer=False),
      model.params,
    ),
    'training': (ql.fake_quantized(gained, model.plan), GAINED),
  }[kind]

  def gradients(p, x):
    loss = lambda p, x: jnp.sum(jnp.sin(apply(p, x)))  # noqa: E731
    found = jax.grad(loss, (0, 1), allow_int=True)(p, x)
    return [
      g for g in jax.tree.leaves(found) if jnp.issubdtype(g.dtype, jnp.floating)
    ]

  want = gradients(params, X)
  assert len(want) >= 4
  assert all(map(np.any, want))
  mesh = Mesh(np.array(jax.devices()[:2]), ('data',))
  inside = jax.shard_map(
    gradients,
    mesh=mesh,
    in_specs=(P(), P('data')),
    out_specs=[P()] * (len(want) - 1) + [P('data')],
  )
  for got, one in zip(jax.jit(inside)(params, X), want, strict=True):
    same_products(got, one)


def test_shared_inputs_after_spread_ones():
  """Of the same shape on each device; each has a trace of its own."""
  apply = lambda p, x: jnp.tanh(jax.nn.relu(x @ p['a'] + p['g']) - 1)  # noqa: E731
  run = ql.quantized(apply)
  want = apply(GAINED, X)
  mesh = Mesh(np.array(jax.devices()[:2]), ('data',))
  for spec, rows in ((P('data'), 4), (P(), 2), (P('data'), 4)):
    inside = jax.shard_map(run, mesh=mesh, in_specs=(P(), spec), out_specs=spec)
    same_products(jax.jit(inside)(GAINED, X[:rows]), want[:rows])
  same_products(run(GAINED, X), want)


def test_one_trace_serves_every_call():
  traces = []

  def apply(params, x):
    traces.append(x.shape)
    return x @ params['w']

  params = {'w': normal(0, 8, 8)}
  plan = ql.plan(apply, params, {'': ql.int8()}, X)
  run = ql.fake_quantized(apply, plan)
  traces.clear()
  for _ in range(3):
    run(params, X)
    jax.jit(run)(params, X)
    jax.grad(lambda p: run(p, X).sum())(params)
  assert traces == [(4, 8)]


# The identity ----------------------------------------------------------------


class Everything:
  """Chooses every site and computes nothing."""

  def init(self, site):
    return jnp.zeros(())

  def update(self, site, stat, lhs, rhs, out, state):
    return stat + 1

  def merge(self, site, a, b):
    return a + b


class Network(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x)))
    x = nn.LayerNorm()(x.reshape(x.shape[0], -1, 4))
    x = x + nn.softmax(x @ x.swapaxes(1, 2)) @ x
    return nn.RNN(nn.SimpleCell(4))(x)


def test_identity_is_exact_to_the_bit():
  x = normal(0, 2, 2, 2, 2)
  params = Network().init(jax.random.key(1), x)
  apply = Network().apply
  rewritten = ql.quantized(apply)
  observed = ql.observe(apply, Everything())

  def run(f):
    def both(p):
      loss, back = jax.vjp(lambda p: f(p, x), p)
      return loss, back(loss)[0]

    return jax.jit(both)(params)

  want = run(apply)
  for got in (run(rewritten), run(lambda p, x: observed(p, x)[0])):
    jax.tree.map(np.testing.assert_array_equal, got, want)
  _, stats = observed(params, x)
  counts = {float(v) for v in jax.tree.leaves(stats)}
  assert counts == {1.0, 4.0}  # once, or at each step of time
