"""Sites inside JAX's containers: quantized, or refused by name."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import snap

import quantlab as ql

pytestmark = pytest.mark.as_for_users

W8 = ql.int8()
W8A8 = ql.rule(weight=ql.int8(), input=ql.int8(per='token'))
STATIC = ql.rule(
  weight=ql.int8(), input=ql.int8(per='tensor', static=True, symmetric=False)
)


W, V, X = normal(0, 8, 8), normal(1, 8, 8), normal(2, 4, 8)
W_HAT, V_HAT = snap.symmetric(W, 0), snap.symmetric(V, 0)


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def run(apply, params, *args, rules=None):
  model = ql.ptq(apply, params, rules or {'': W8}, [args])
  return model.apply(model.params, *args), model


# Branches and loops ----------------------------------------------------------


def branching(params, x, flag):
  return lax.cond(
    flag > 0, lambda: jnp.tanh(x @ params['w']), lambda: x @ params['v'] + 1.0
  )


@pytest.mark.parametrize('flag', [1.0, -1.0])
def test_cond(flag):
  params = {'w': W, 'v': V}
  out, model = run(branching, params, X, jnp.float32(flag))
  want = np.tanh(X @ W_HAT) if flag > 0 else X @ V_HAT + 1
  close(out, want)
  for other in (1.0, -1.0):  # the branch that planning did not take
    got = model.apply(model.params, X, jnp.float32(other))
    close(got, branching({'w': W_HAT, 'v': V_HAT}, X, other))


def test_static_ranges_in_a_branch():
  params = {'w': W, 'v': V}
  up, down = (X, jnp.float32(1)), (3 * X, jnp.float32(-1))
  with pytest.raises(
    ValueError, match=r"no calibration batch reaches site 'v'"
  ):
    ql.ptq(branching, params, {'': STATIC}, [up])
  model = ql.ptq(branching, params, {'': STATIC}, [up, down])
  close(
    model.apply(model.params, *up),
    np.tanh(snap.fixed(X, X.min(), X.max()) @ W_HAT),
  )
  close(
    model.apply(model.params, *down),
    snap.fixed(3 * X, 3 * X.min(), 3 * X.max()) @ V_HAT + 1,
  )


def test_weights_chosen_by_a_branch():
  def apply(params, x, flag):
    w = lax.cond(flag > 0, lambda: params['w'], lambda: params['v'])
    return (x @ w) @ params['w'] + x @ params['v']

  params = {'w': W, 'v': V}
  out, model = run(apply, params, X, jnp.float32(1))
  close(out, (X @ W_HAT) @ W_HAT + X @ V_HAT)
  close(
    model.apply(model.params, X, jnp.float32(-1)),
    (X @ V_HAT) @ W_HAT + X @ V_HAT,
  )
  # The choice itself depends on the input: no parameter of its own.
  assert list(model.plan.sites) == ['dot_0', 'w', 'v']


def test_while_and_fori():
  def apply(params, x):
    x = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ params['w']), x)
    return lax.while_loop(
      lambda c: c[1] < 2,
      lambda c: (jnp.sin(c[0] @ params['v']), c[1] + 1),
      (x, 0),
    )[0]

  out, _ = run(apply, {'w': W, 'v': V}, X)
  want = X
  for _ in range(3):
    want = np.tanh(want @ W_HAT)
  for _ in range(2):
    want = np.sin(want @ V_HAT)
  close(out, want)
  # One range serves all steps, and statistics are merged over them.
  _, static = run(apply, {'w': W, 'v': V}, X, rules={'': STATIC})
  assert static.params['sites']['v']['input']['scale'].shape == (1, 1)


def test_parameters_carried_through_a_loop():
  def apply(params, x):
    def step(_, carry):
      x, p = carry
      return jnp.tanh(x @ p['w']), p

    return lax.fori_loop(0, 2, step, (x, params))[0]

  out, _ = run(apply, {'w': W}, X)
  close(out, np.tanh(np.tanh(X @ W_HAT) @ W_HAT))


def test_weights_that_change_in_a_loop_are_refused():
  def apply(params, x):
    def step(_, carry):
      x, w = carry
      return jnp.tanh(x @ w), w * 0.5

    return lax.fori_loop(0, 2, step, (x, params['w']))[0]

  with pytest.raises(ValueError, match=r'weight .*changes|computed inside a'):
    ql.plan(apply, {'w': W}, {'w': W8}, X)

  def decaying(params, x):
    scales = jnp.arange(1.0, 4.0)
    return lax.scan(lambda x, s: (x @ (params['w'] * s), None), x, scales)[0]

  with pytest.raises(ValueError, match='changes from step to step'):
    ql.plan(decaying, {'w': W}, {'w': W8}, X)


def test_parameter_added_to_a_carry_is_named():
  def apply(params, x):
    return lax.fori_loop(0, 2, lambda _, h: h @ params['w'] + params['w'], x)

  with pytest.raises(ValueError, match=r"'w' reaches 'add'.*carry of a loop"):
    ql.plan(apply, {'w': W}, {'w': W8}, normal(0, 8, 8))


def test_nested_scans_keep_a_range_for_each_layer():
  params = {'w': normal(0, 2, 3, 8, 8), 'g': jnp.ones((2, 8))}

  def apply(params, x):
    def inner(x, w):
      return jnp.tanh(x @ w), None

    def outer(x, p):
      y = jax.checkpoint(lambda x: lax.scan(inner, x * p['g'], p['w'])[0])(x)
      return y + x, None

    return lax.scan(outer, x, params)[0]

  out, model = run(apply, params, X, rules={'w': STATIC})
  assert model.params['sites']['w']['input']['scale'].shape == (2, 3, 1, 1)
  assert model.params['weights']['w'].scale.shape == (2, 3, 1, 8)
  assert snap.error(out, apply(params, X)) < 3e-2


def test_layers_inside_a_time_loop():
  """A scan over layers in a scan over time: ranges by layer, over all steps."""
  params = {'w': normal(0, 2, 8, 8)}

  def apply(params, xs):
    def step(h, x):
      h = lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h + x, params['w'])[0]
      return h, h

    return lax.scan(step, jnp.zeros((4, 8)), xs)[1]

  xs = normal(1, 5, 4, 8)
  out, model = run(apply, params, xs, rules={'w': STATIC})
  seen = [[], []]
  h = np.zeros((4, 8), np.float32)
  for x in np.asarray(xs):
    h = h + x
    for i in range(2):
      seen[i].append(h)
      h = np.tanh(h @ params['w'][i])
  scale = model.params['sites']['w']['input']['scale']
  for i in range(2):
    want = (np.max(seen[i]) - np.min(seen[i])) / 255
    np.testing.assert_allclose(scale[i, 0, 0], want, rtol=1e-5)
  assert snap.error(out, apply(params, xs)) < 5e-2


def test_scanned_layers_in_a_branch():
  params = {'w': normal(0, 2, 8, 8)}

  def apply(params, x, flag):
    def deep():
      return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params['w'])[0]

    return lax.cond(flag, deep, lambda: x)

  out, model = run(apply, params, X, jnp.array(True), rules={'w': STATIC})
  assert model.params['sites']['w']['input']['scale'].shape == (2, 1, 1)
  assert snap.error(out, apply(params, X, True)) < 3e-2
  np.testing.assert_array_equal(
    model.apply(model.params, X, jnp.array(False)), X
  )


def test_scan_along_an_axis_that_is_contracted():
  """The rows of a weight scanned one by one: no layer loop of its codes."""

  def apply(params, x):
    y = x @ params['w']
    return lax.scan(lambda c, row: (c + row, None), y[0], params['w'])[0]

  with pytest.raises(ValueError, match=r"'w' reaches 'scan"):
    ql.plan(apply, {'w': W}, {'w': W8}, X)


# Calls -----------------------------------------------------------------------


def test_already_jitted_with_donation_and_shardings():
  mesh = Mesh(np.array(jax.devices()[:4]), ('data',))
  rows = NamedSharding(mesh, P('data', None))

  @jax.jit
  def inner(w, x):
    return x @ w

  def apply(params, x):
    h = jax.jit(inner, donate_argnums=1)(params['w'], x + 0)
    h = lax.with_sharding_constraint(h, rows)
    return jax.jit(inner, out_shardings=rows)(params['v'], h)

  model = ql.ptq(jax.jit(apply), {'w': W, 'v': V}, {'': W8}, [X])
  out = jax.jit(model.apply)(model.params, X)
  close(out, (X @ W_HAT) @ V_HAT)
  assert out.sharding.is_equivalent_to(rows, 2)


def test_function_that_returns_gradients():
  def loss(params, x):
    return jnp.sum(jnp.tanh(x @ params['w']) ** 2)

  def apply(params, x):
    return jax.value_and_grad(loss, argnums=1)(params, x)

  (value, grad), model = run(apply, {'w': W}, X)
  y = np.tanh(X @ W_HAT)
  close(value, np.sum(y**2))
  close(grad, (2 * y * (1 - y**2)) @ W_HAT.T)
  assert list(model.plan.sites) == ['w', 'w:1']
  [note] = model.plan.notes
  assert 'contracts other axes' in note


def test_shard_map():
  mesh = Mesh(np.array(jax.devices()[:4]), ('data',))

  def apply(params, x):
    inside = jax.shard_map(
      lambda x, v: x @ v,
      mesh=mesh,
      in_specs=(P('data'), P()),
      out_specs=P('data'),
    )
    return inside(x @ params['w'], params['v'])

  params = {'w': W, 'v': V}
  out, _ = run(apply, params, X, rules={'w': W8})
  close(out, (X @ W_HAT) @ V)
  with pytest.raises(ValueError, match=r"'v' cannot be .*inside shard_map"):
    ql.plan(apply, params, {'': W8}, X)


def test_random_keys_and_effects(capfd):
  class Model(nn.Module):
    @nn.compact
    def __call__(self, x, train):
      x = nn.Dropout(0.5, deterministic=not train)(nn.Dense(8)(x))
      jax.debug.print('mean {m}', m=x.mean())
      return jax.lax.scan(printed, x, None, length=2)[0]

  def printed(x, _):
    jax.debug.callback(lambda m: seen.append(float(m)), x.mean())
    return x, None

  seen = []
  params = Model().init(jax.random.key(0), X, False)

  def apply(params, x, key):
    return Model().apply(params, x, True, rngs={'dropout': key})

  key = jax.random.key(3)
  model = ql.ptq(apply, params, {'kernel': W8}, [(X, key)])
  capfd.readouterr()
  seen.clear()
  out = jax.block_until_ready(jax.jit(model.apply)(model.params, X, key))
  jax.effects_barrier()
  assert capfd.readouterr().out.count('mean') == 1
  assert len(seen) == 2
  want = apply(params, X, key)
  np.testing.assert_array_equal(np.asarray(out) == 0, np.asarray(want) == 0)
  assert 1e-4 < snap.error(out, want) < 3e-2


def test_printing_a_quantized_parameter_is_refused():
  def apply(p, x):
    jax.debug.print('mean of w: {m}', m=jnp.mean(p['w']))
    return x @ p['w']

  with pytest.raises(
    ValueError, match=r"'w' reaches .*needed by the effect of"
  ):
    ql.plan(apply, {'w': W}, {'w': W8}, X)
  lenient = ql.recipe({'w': W8}, strict=False)
  assert any(
    'w: dequantized' in n for n in ql.plan(apply, {'w': W}, lenient, X).notes
  )


# Parameters that the function closes over ------------------------------------


def test_closed_over_parameters():
  params = {'w': W, 'v': V}

  def apply(p, x):
    return (x @ params['w']) @ p['v']  # one of the two is a constant

  model = ql.ptq(apply, params, {'': W8}, [X])
  assert list(model.plan.sites) == ['w', 'v']
  want = (X @ W_HAT) @ V_HAT
  close(model.apply(model.params, X), want)
  close(jax.jit(model.apply)(model.params, X), want)
  # Later only the contents tell which constant was the parameter.
  again = ql.ptq(apply, params, {'': W8}, [X])
  plan = ql.Plan.from_json(again.plan.to_json())
  copy = {'w': jnp.array(np.asarray(W)), 'v': V}

  def reloaded(p, x):
    return (x @ copy['w']) @ p['v']

  close(ql.quantized(reloaded, plan)(again.params, X), want)
  changed = {'w': W + 1}

  def other(p, x):
    return (x @ changed['w']) @ p['v']

  with pytest.raises(ValueError, match='does not know'):
    ql.quantized(other, plan)(again.params, X)


def test_constant_that_is_no_parameter_is_refused_by_name():
  fixed = normal(5, 8, 8)
  params = {'v': V}

  def apply(p, x):
    return (x @ fixed) @ p['v']

  plan = ql.plan(apply, params, {'v': W8}, X)
  [constant] = [s for s in plan.sites.values() if s.derivation == 'constant']
  with pytest.raises(ValueError, match='is a constant, not a parameter'):
    ql.plan(apply, params, {f'site:{constant.id}': W8}, X)


# Where a rewritten function may be called ------------------------------------


def test_called_in_a_loop_and_over_outer_tracers():
  params = {'w': W / 3}
  model = ql.ptq(lambda p, x: jnp.tanh(x @ p['w']), params, {'': W8A8}, [X])
  want = X
  for _ in range(3):
    want = model.apply(model.params, want)

  def loop(params, x):
    def step(h, _):
      return model.apply(params, h), None

    return lax.scan(step, x, None, length=3)[0]

  close(jax.jit(loop)(model.params, X), want)

  def scaled(s):
    def apply(p, x):
      return x @ p['w'] * s  # closes over a tracer: nothing may be kept

    run = ql.fake_quantized(apply, ql.plan(apply, params, {'': W8}, X))
    return run(params, X) + run(params, X)

  y = 2 * X @ snap.symmetric(params['w'], 0)
  close(jax.jit(scaled)(3.0), 3 * y)
  close(jax.vmap(scaled)(jnp.array([2.0, 3.0]))[1], 3 * y)
  close(jax.grad(lambda s: scaled(s).sum())(2.0), y.sum())


# What is no site, and what has no name ---------------------------------------


def test_products_of_parameters_alone_are_noted():
  def apply(p, x):
    return (x + p['position'] @ p['mix']) @ p['v']

  params = {'position': normal(0, 4, 8), 'mix': W, 'v': V}
  plan = ql.plan(apply, params, {'v': W8}, X)
  assert list(plan.sites) == ['v']
  assert [n.split()[0] for n in sorted(plan.notes)] == ['mix', 'position']
  assert all('no site' in n for n in plan.notes)


def test_parameters_of_one_path_are_refused():
  params = {'a/b': {'c': W}, 'a': {'b/c': V}}
  with pytest.raises(ValueError, match='share a path: a/b/c'):
    ql.plan(lambda p, x: x @ p['a/b']['c'] @ p['a']['b/c'], params, {'': W8}, X)


def test_nnx_state_with_keys_and_norms():
  from flax import nnx

  class Net(nnx.Module):
    def __init__(self, rngs):
      self.linear = nnx.Linear(8, 8, rngs=rngs)
      self.drop = nnx.Dropout(0.5, rngs=rngs, deterministic=True)
      self.norm = nnx.BatchNorm(8, rngs=rngs, use_running_average=True)

    def __call__(self, x):
      return self.norm(self.drop(self.linear(x)))

  net = Net(nnx.Rngs(0))
  graph, state = nnx.split(net)  # parameters, statistics and random keys
  out, model = run(lambda s, x: nnx.merge(graph, s)(x), state, X)
  kernel = np.asarray(state['linear']['kernel'][...])
  want = X @ snap.symmetric(kernel, 0) / np.sqrt(1 + 1e-5)
  close(out, want)
  assert model.plan.folded == {'linear/kernel'}
