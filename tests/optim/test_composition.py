"""Optimizers of optax on the variables of `ql.qat`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import quantlab as ql
from quantlab.core import is_qtensor
from quantlab.optim import eight_bit


def setup():
  rng = np.random.default_rng(0)
  params = {
    'a': jnp.asarray(rng.normal(size=(32, 64)) / 6, jnp.float32),
    'b': jnp.asarray(rng.normal(size=(64, 4)) / 8, jnp.float32),
  }
  x, y = (jnp.asarray(rng.normal(size=(16, n)), jnp.float32) for n in (32, 4))

  def apply(p, x):
    return jax.nn.relu(x @ p['a']) @ p['b']

  rule = ql.rule(weight=ql.int4(), input=ql.int8(per='tensor', static=True))
  plan = ql.plan(apply, params, {'.': rule}, x)
  qat = ql.qat(apply, plan, ql.estimators.lsq())

  def loss(variables):
    return jnp.mean((qat.apply(variables, x) - y) ** 2)

  return plan, qat, qat.init(params, [x]), loss, x


def test_sam_steps_from_the_worst_point_nearby():
  """optax.contrib.sam, arXiv 2010.01412: g(v + rho g / |g|), steps included."""
  _, qat, variables, loss, x = setup()
  rho, rate = 0.05, 0.1
  adversary = optax.chain(optax.contrib.normalize(), optax.sgd(rho))
  sam = optax.contrib.sam(
    optax.sgd(rate), adversary, sync_period=2, opaque_mode=True
  )
  gradient = jax.jit(jax.grad(loss))

  @jax.jit
  def step(variables, state):
    updates, state = sam.update(
      gradient(variables), state, variables, grad_fn=lambda v, _: gradient(v)
    )
    return optax.apply_updates(variables, updates), state

  new, state = step(variables, sam.init(variables))
  g = gradient(variables)
  size = optax.tree_utils.tree_norm(g)
  worst = jax.tree.map(lambda v, d: v + rho * d / size, variables, g)
  want = jax.tree.map(lambda v, d: v - rate * d, variables, gradient(worst))
  for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
  loss = jax.jit(loss)
  before = loss(variables)
  for _ in range(20):
    new, state = step(new, state)
  assert loss(new) < 0.8 * before
  model = qat.freeze(new)
  np.testing.assert_allclose(
    model.apply(model.params, x), qat.apply(new, x), rtol=0, atol=1e-5
  )


def test_8_bit_moments_by_label():
  """8-bit moments for weights, Adam's own for learned steps, the rest still."""
  plan, _, variables, loss, _ = setup()
  optimizer = optax.multi_transform(
    {
      'weight': eight_bit(optax.adam(3e-3), min_size=1024),
      'step': optax.adam(1e-3),
      'state': optax.set_to_zero(),
    },
    plan.labels(variables),
  )

  @jax.jit
  def step(variables, state):
    updates, state = optimizer.update(jax.grad(loss)(variables), state)
    return optax.apply_updates(variables, updates), state

  state = optimizer.init(variables)
  coded = [
    q for q in jax.tree.leaves(state, is_leaf=is_qtensor) if is_qtensor(q)
  ]
  assert [q.shape for q in coded] == [(32, 64), (32, 64)]
  loss = jax.jit(loss)
  before, trained = loss(variables), variables
  for _ in range(60):
    trained, state = step(trained, state)
  assert loss(trained) < 0.7 * before
  moved = trained['sites']['a']['weight']['step']
  assert np.any(moved != variables['sites']['a']['weight']['step'])
