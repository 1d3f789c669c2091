"""At two bits the estimators rank as their papers say, on real digits.

An MLP 64-32-32-32-10, all products but the first at W2A2, trained on from
float (95.9) for 300 steps. Over sixteen seeds the means are 93.8 (LSQ), 93.6
(EWGS), 85.9 (PACT and DoReFa) and 64.4 (ranges of the extremes), with standard
deviations over seeds of 1.2, 1.3, 1.7 and 8.9 points; margins are for four.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import quantlab as ql
from quantlab.data import embedded

E = ql.estimators
SIZES = (64, 32, 32, 32, 10)
SEEDS = 4
STATIC = {'per': 'tensor', 'static': True}
BEST = ql.scales.mse()
LSQ = ql.rule(
  weight=ql.int2(per='tensor', scale=BEST),
  input=ql.uint2(scale=BEST, **STATIC),
)
VARIANTS = {
  'extremes': (
    ql.rule(weight=ql.int2(per='tensor'), input=ql.uint2(per='tensor')),
    E.clipped_ste(),
  ),
  'pact and dorefa': (
    ql.rule(weight=ql.odd(per='tensor'), input=ql.uint2(**STATIC)),
    {'weight': E.dorefa(), 'input': E.pact()},
  ),
  'lsq': (LSQ, E.lsq()),
  'ewgs': (LSQ, E.ewgs(0.2)),
}


def apply(p, x):
  for i in range(3):
    x = jax.nn.relu(x @ p[f'w{i}'] + p[f'b{i}'])
  return x @ p['w3'] + p['b3']


def init(key):
  keys = jax.random.split(key, 4)
  params = {}
  for i, (k, a, b) in enumerate(zip(keys, SIZES, SIZES[1:], strict=False)):
    params[f'w{i}'] = jax.random.normal(k, (a, b)) * np.sqrt(2 / a)
    params[f'b{i}'] = jnp.zeros(b)
  return params


@pytest.fixture(scope='module')
def digits():
  d = embedded.digits()

  def flat(x):
    return jnp.asarray(x.reshape(len(x), -1), jnp.float32) / 16

  train = flat(d.train_x), jnp.asarray(d.train_y)
  return train, (flat(d.test_x), jnp.asarray(d.test_y))


def trained(run, variables, keys, data, optimizer, steps=300):
  """Every seed by itself, all in one program."""
  x, y = data

  def loss(v, i):
    logits = run(v, x[i])
    return optax.softmax_cross_entropy_with_integer_labels(logits, y[i]).mean()

  def step(carry, key):
    v, state = carry
    i = jax.random.randint(key, (128,), 0, len(x))
    updates, state = optimizer.update(jax.grad(loss)(v, i), state, v)
    return (optax.apply_updates(v, updates), state), None

  def one(v, key):
    keys = jax.random.split(key, steps)
    (v, _), _ = jax.lax.scan(step, (v, optimizer.init(v)), keys)
    return v

  return jax.jit(jax.vmap(one))(variables, keys)


def accuracy(run, variables, data):
  x, y = data

  def one(v):
    return 100 * (run(v, x).argmax(-1) == y).mean()

  return np.asarray(jax.jit(jax.vmap(one))(variables))


@pytest.fixture(scope='module')
def results(digits):
  data, held_out = digits
  keys = jax.random.split(jax.random.key(0), SEEDS)
  rate = optax.cosine_decay_schedule(3e-3, 300)
  floats = trained(apply, jax.vmap(init)(keys), keys, data, optax.adam(rate))
  found = {'float': accuracy(apply, floats, held_out)}
  for name, (rule, estimator) in VARIANTS.items():
    each = [jax.tree.map(lambda a, s=s: a[s], floats) for s in range(SEEDS)]
    plan = ql.plan(apply, each[0], {'w0': None, '': rule}, data[0][:8])
    train = ql.qat(apply, plan, estimator)
    starts = [train.init(p, [data[0][:512]]) for p in each]
    labels = plan.labels(starts[0])
    variables = jax.tree.map(lambda *a: jnp.stack(a), *starts)
    found[f'{name} before'] = accuracy(train.apply, variables, held_out)
    kinds = {k: optax.adam(rate) for k in ('weight', 'step')}
    kinds['state'] = optax.set_to_zero()
    optimizer = optax.multi_transform(kinds, labels)
    end = trained(train.apply, variables, keys, data, optimizer)
    found[name] = accuracy(train.apply, end, held_out)
    if name == 'lsq':
      first = jax.tree.map(lambda a: a[0], end)
      model = train.freeze(first)
      logits = jax.jit(model.apply)(model.params, held_out[0])
      same = logits.argmax(-1) == train.apply(first, held_out[0]).argmax(-1)
      found['frozen'] = np.asarray(same)
  return {k: np.asarray(v) for k, v in found.items()}


def test_estimators_rank_as_published(results):
  mean = {k: v.mean() for k, v in results.items()}
  text = {k: f'{v.mean():.2f} +- {v.std():.2f}' for k, v in results.items()}
  assert mean['lsq'] > mean['extremes'] + 12, text
  assert mean['ewgs'] > mean['extremes'] + 12, text
  assert mean['lsq'] > mean['pact and dorefa'] + 4, text
  assert mean['pact and dorefa'] > mean['extremes'] + 6, text


def test_training_recovers_what_rounding_costs(results):
  mean = {k: v.mean() for k, v in results.items()}
  assert mean['lsq before'] < mean['float'] - 15
  assert mean['lsq'] > mean['float'] - 5


def test_the_frozen_model_answers_alike(results):
  assert results['frozen'].mean() > 0.995  # integer sums round less
