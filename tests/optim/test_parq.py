"""PARQ: the schedule, the proximal map, and where training ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import quantlab as ql
from quantlab import core
from quantlab.data import embedded
from quantlab.optim import eight_bit, inverse_slope, parq, prox, ranges

drawing = jax.jit(prox, static_argnums=1)
INT4 = ql.int4(per='channel')
TERNARY = ql.ternary(per='channel')


@pytest.mark.parametrize('center', [0.5, 0.3, 0.8])
def test_schedule_falls_from_one_to_zero(center):
  r = np.asarray(
    inverse_slope(jnp.arange(70), 10, 50, steepness=8.0, center=center)
  )
  assert (r[:11] == 1).all()
  assert (r[50:] == 0).all()
  assert (np.diff(r[10:51]) < 0).all()
  steepest = np.argmin(np.diff(r)) + 0.5
  assert abs(steepest - (10 + 40 * center)) <= 1
  f = 7 / 40  # a plain logistic curve, shifted and stretched
  curve = [1 / (1 + np.exp(8 * (v - center))) for v in (f, 0, 1)]
  want = (curve[0] - curve[2]) / (curve[1] - curve[2])
  np.testing.assert_allclose(r[17], want, rtol=1e-5)


def drawn(x, levels, r):
  """The map of one number, as arXiv 2503.15748 draws it."""
  if x <= levels[0]:
    return levels[0] + r * (x - levels[0])
  if x >= levels[-1]:
    return levels[-1] + r * (x - levels[-1])
  low = max(v for v in levels if v <= x)
  high = min(v for v in levels if v > x)
  middle = (low + high) / 2
  return min(max(middle + (x - middle) / r, low), high)


GRIDS = {
  'int4': (INT4, np.arange(-8, 8.0)),
  'uint2 with a zero point': (
    ql.uint2(per='channel', symmetric=False),
    np.arange(4) - 1.0,
  ),
  'ternary': (TERNARY, np.array([-1.0, 0, 1])),
  'binary': (ql.binary(per='channel'), np.array([-1.0, 1])),
}


@pytest.mark.parametrize('name', GRIDS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), r=st.floats(0.01, 0.999))
def test_prox_is_the_piecewise_line(name, seed, r):
  quantizer, levels = GRIDS[name]
  rng = np.random.default_rng(seed)
  scale = rng.uniform(0.05, 3, (1, 3)).astype(np.float32)
  x = (rng.uniform(-1.5, 1.5, (16, 3)) * levels.max() * scale).astype('f')
  zero = None if quantizer.symmetric else jnp.ones((1, 3))
  qparams = core.QParams(jnp.asarray(scale), zero)
  got = drawing(x, quantizer, qparams, r)
  want = np.vectorize(lambda v: drawn(v, levels, r))(x / scale) * scale
  np.testing.assert_allclose(
    got, want, rtol=0, atol=3e-6 / r * np.abs(levels).max() * scale.max()
  )


def test_prox_ends_are_the_identity_and_rounding():
  x = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
  for quantizer in (TERNARY, ql.int8(group=32)):
    qparams = core.fit(x, quantizer)
    np.testing.assert_array_equal(drawing(x, quantizer, qparams, 1.0), x)
    want = core.fake_quantize(x, quantizer)
    np.testing.assert_array_equal(drawing(x, quantizer, qparams, 0.0), want)
    for r in (0.999, 0.001):  # and is continuous there
      near = np.asarray(drawing(x, quantizer, qparams, r))
      end = x if r > 0.5 else np.asarray(want)
      assert np.quantile(np.abs(near - end) / qparams.scale.max(), 0.99) < 0.01


def net(params, x):
  for name in ('a', 'b'):
    x = jax.nn.relu(x @ params[name])
    x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
  return x @ params['head']


def data():
  d = embedded.digits()
  x, tx = (v.reshape(-1, 64) / 16.0 for v in (d.train_x, d.test_x))
  return jnp.asarray(x), jnp.asarray(d.train_y), jnp.asarray(tx), d.test_y


def start(key):
  keys = jax.random.split(key, 3)
  sizes = {'a': (64, 32), 'b': (32, 32), 'head': (32, 10)}
  return {
    name: jax.random.normal(k, s) / np.sqrt(s[0])
    for k, (name, s) in zip(keys, sizes.items(), strict=True)
  }


def plan_of(quantizer):
  params = jax.eval_shape(start, jax.random.key(0))
  recipe = {'^/[ab]$': quantizer, 'head': ql.int8()}
  return ql.plan(net, params, recipe, jax.ShapeDtypeStruct((4, 64), 'float32'))


SEEDS, STEPS, END = 4, 240, 120
RATE = optax.cosine_decay_schedule(1e-2, STEPS)


def train(forward, optimizer, init=lambda p: p, steps=STEPS, seeds=SEEDS):
  """Trained parameters, optimizer states, and parameters before `END`."""
  x, y, _, _ = data()

  def loss(p, at):
    logits = forward(p, x[at])
    return optax.softmax_cross_entropy_with_integer_labels(logits, y[at]).mean()

  def one(key):
    def step(carry, key):
      params, state, before = carry
      at = jax.random.randint(key, (64,), 0, len(x))
      updates, state = optimizer.update(
        jax.grad(loss)(params, at), state, params
      )
      new = optax.apply_updates(params, updates)
      early = key_count(state) < END
      before = jax.tree.map(lambda a, b: jnp.where(early, a, b), new, before)
      return (new, state, before), None

    params = init(start(key))
    begin = params, (optimizer.init(params)), params
    keys = jax.random.split(jax.random.fold_in(key, 1), steps)
    return jax.lax.scan(step, begin, keys)[0]

  return jax.jit(lambda ks: jax.lax.map(one, ks))(
    jax.random.split(jax.random.key(3), seeds)
  )


def key_count(state):
  return optax.tree_utils.tree_get(state, 'count', 0, filtering=_is_parq)


def _is_parq(path, _):
  return 'ParqState' in str(path[-1])


def accuracy(params, forward=net):
  _, _, tx, ty = data()
  logits = jax.lax.map(lambda p: forward(p, tx), params)
  return np.asarray((jnp.argmax(logits, -1) == ty).mean(-1)) * 100


@functools.cache
def ternary():
  plan = plan_of(TERNARY)
  optimizer = parq(optax.adam(RATE), plan, start=15, end=END)
  return plan, train(net, optimizer)


def pick(tree, i):
  return jax.tree.map(lambda v: v[i], tree)


def test_before_the_start_it_is_the_optimizer_alone():
  """The same updates, weight decay included, for the same gradients."""
  adam = optax.adamw(1e-2, weight_decay=0.1)
  ours = parq(adam, plan_of(TERNARY), start=6, end=7)
  one, other = start(jax.random.key(0)), start(jax.random.key(0))
  one_state, other_state = adam.init(one), ours.init(other)

  def stepping(optimizer):
    def step(grads, state, params):
      updates, state = optimizer.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    return jax.jit(step)

  step, our_step = stepping(adam), stepping(ours)
  for i in range(6):
    grads = start(jax.random.key(i))
    one, one_state = step(grads, one_state, one)
    other, other_state = our_step(grads, other_state, other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=1e-7 * (i + 1))
  last, _ = our_step(grads, other_state, other)
  scaled = np.asarray(last['a']) / np.abs(last['a']).max(0)
  np.testing.assert_allclose(scaled, np.round(scaled), atol=1e-6)  # at `end`


def test_after_the_end_parameters_are_what_freeze_stores():
  plan, (params, states, _) = ternary()
  for i in range(2):
    mine = pick(params, i)
    sites = ranges(pick(states, i), plan)
    qat = ql.qat(net, plan, ql.estimators.ste())
    model = qat.freeze({'weights': mine, 'sites': sites})
    for name in ('a', 'b', 'head'):
      q = model.params['weights'][name]
      np.testing.assert_array_equal(q.dequantize(), mine[name])
    assert len(np.unique(model.params['weights']['a'].unpack())) == 3


def test_accuracy_does_not_fall_at_the_end_and_is_that_of_ste():
  plan, (params, _, before) = ternary()
  qat = ql.qat(net, plan, ql.estimators.ste())
  variables, _, _ = train(
    qat.apply, optax.adam(RATE), init=lambda p: {'weights': p, 'sites': {}}
  )
  ours, early = accuracy(params), accuracy(before)
  theirs = accuracy(variables, qat.apply)
  assert ours.mean() > early.mean() - 1
  noise = np.hypot(ours.std(ddof=1), theirs.std(ddof=1))
  assert ours.mean() > theirs.mean() - noise


def test_with_8_bit_moments_and_scanned_layers():
  """Latents stay in float, a stack has a grid for each layer."""

  def apply(params, x):
    def body(x, w):
      return jnp.tanh(x @ w), None

    return jax.lax.scan(body, x, params['layers'])[0]

  rng = np.random.default_rng(0)
  w = np.linspace(0.1, 2, 3)[:, None, None] * rng.normal(size=(3, 64, 64))
  params = {'layers': jnp.asarray(w, jnp.float32)}
  x = jnp.ones((2, 64))
  plan = ql.plan(apply, params, {'layers': INT4}, x)
  optimizer = eight_bit(parq(optax.adam(1e-3), plan, start=1, end=4, period=1))

  @jax.jit
  def step(params, state):
    grads = jax.grad(lambda p: jnp.sum(apply(p, x) ** 2))(params)
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  assert state.latents['layers'].dtype == jnp.float32
  for _ in range(6):
    params, state = step(params, state)
  scale = np.asarray(state.qparams['layers'].scale)
  assert scale.shape == (3, 1, 64)
  codes = np.asarray(params['layers']) / scale
  np.testing.assert_allclose(codes, np.round(codes), atol=1e-5)
  assert set(ranges(state, plan)) == {'layers'}


def test_refusals():
  plan = plan_of(TERNARY)
  adam = optax.adam(1e-2)
  with pytest.raises(ValueError, match='0 <= start < end'):
    parq(adam, plan, start=5, end=5)
  with pytest.raises(ValueError, match=r"'a' is planned as codebook"):
    parq(adam, plan_of(ql.codebook(bits=2)), start=0, end=5)
  optimizer = parq(adam, plan, start=0, end=5)
  with pytest.raises(ValueError, match=r"plan stores \['a'.*lack"):
    optimizer.init({'c': jnp.ones((3, 3))})
  params = start(jax.random.key(0))
  with pytest.raises(ValueError, match='update\\(grads, state, params\\)'):
    optimizer.update(params, optimizer.init(params))
  with pytest.raises(ValueError, match='holds 0 states of parq'):
    ranges(adam.init(params), plan)

  def normed(params, x):
    w = params['v'] * params['g'] / jnp.linalg.norm(params['v'], axis=0)
    return x @ w

  computed = ql.plan(
    normed,
    {'v': jnp.ones((8, 4)), 'g': jnp.ones(4)},
    {'v': INT4},
    jnp.ones((2, 8)),
  )
  with pytest.raises(ValueError, match='computes the weights of'):
    parq(adam, computed, start=0, end=5)
