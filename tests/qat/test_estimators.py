"""Estimators: the forward pass is plain rounding, gradients are the papers'."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantlab as ql
from quantlab import core

pytestmark = pytest.mark.as_for_users

E = ql.estimators
S = 0.25
# Inside, on a level, between levels, and beyond both ends of int3 at step S.
X = np.array([[0.1, -0.25, 0.374, 5.0, -5.0]], np.float32)
INT3 = ql.int3(per='tensor', static=True)
UINT2 = ql.uint2(per='tensor', static=True)
G = np.array([[1.0, -2.0, 0.5, 3.0, -1.5]], np.float32)


def gradients(estimator, q, leaves, x=X, g=G, count=1):
  """Gradients of sum(g x_hat) for x and for the leaves."""

  def loss(x, leaves):
    return jnp.sum(g * estimator.simulate(x, q, leaves, -1, count))

  leaves = {k: jnp.full((1, 1), v, jnp.float32) for k, v in leaves.items()}
  dx, dleaves = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(x), leaves)
  return np.asarray(dx), {k: float(v[0, 0]) for k, v in dleaves.items()}


def levels(x, s, n, p):
  return np.clip(np.round(x / np.float32(s)), n, p)


def test_ste_passes_every_gradient():
  dx, _ = gradients(E.ste(), INT3, {'scale': S})
  np.testing.assert_array_equal(dx, G)


def test_clipped_ste_stops_where_a_value_is_clipped():
  dx, _ = gradients(E.clipped_ste(), INT3, {'scale': S})
  np.testing.assert_array_equal(dx, G * [[1, 1, 1, 0, 0]])


@pytest.mark.parametrize('count', [1, 20])
def test_lsq_is_equation_3_scaled_by_equation_5(count):
  dx, d = gradients(E.lsq(), INT3, {'step': S}, count=count)
  v = X / S
  inside = (v >= -4) & (v <= 3)
  ds = np.where(inside, np.round(v) - v, np.clip(v, -4, 3))
  np.testing.assert_array_equal(dx, G * inside)
  want = (G * ds).sum() / np.sqrt(count * 3)
  np.testing.assert_allclose(d['step'], want, rtol=1e-6)


def test_lsq_plus_learns_the_offset_where_values_are_clipped():
  """LSQ+, arXiv 2004.09576, equations 5 and 6, with an integer zero point."""
  q = ql.uint2(per='tensor', static=True, symmetric=False)
  beta = -2 * S  # the zero point is 2: codes 0 .. 3 are -0.5 .. 0.25
  dx, d = gradients(E.lsq(), q, {'step': S, 'offset': beta})
  v = (X - beta) / S
  inside = (v >= -0.5) & (v <= 3.5)
  ds = np.where(inside, np.round(v) - v, np.clip(v, 0, 3))
  np.testing.assert_array_equal(dx, G * inside)
  factor = 1 / np.sqrt(3)
  np.testing.assert_allclose(d['step'], (G * ds).sum() * factor, rtol=1e-5)
  beta_gradient = (G * ~inside).sum() * factor
  np.testing.assert_allclose(d['offset'], beta_gradient, rtol=1e-6)


def test_pact_is_equation_3():
  alpha = 3 * S
  dx, d = gradients(E.pact(), UINT2, {'alpha': alpha})
  np.testing.assert_array_equal(dx, G * ((X > 0) & (alpha > X)))
  assert d['alpha'] == G[alpha <= X].sum()


def test_signed_pact_clips_both_sides():
  alpha = 3 * S
  q = ql.int3(per='tensor', static=True, narrow=True)
  dx, d = gradients(E.pact(), q, {'alpha': alpha})
  np.testing.assert_array_equal(dx, G * (np.abs(X) < alpha))
  assert d['alpha'] == G[alpha <= X].sum() - G[-alpha >= X].sum()


@pytest.mark.parametrize('delta', [0.0, 0.2])
def test_ewgs_is_equation_4(delta):
  dx, _ = gradients(E.ewgs(delta, E.clipped_ste()), INT3, {'scale': S})
  v = X / S
  inside = (v >= -4) & (v <= 3)
  error = v - levels(X, S, -4, 3)
  want = G * (1 + delta * np.sign(G) * error) * inside
  np.testing.assert_allclose(dx, want, rtol=1e-6)


@pytest.mark.parametrize('bits', [1, 2, 3, 4])
def test_dorefa_levels_are_equation_9(bits):
  w = np.random.default_rng(bits).normal(size=(16, 8)).astype(np.float32)
  q = ql.odd(bits=bits, per='tensor') if bits > 1 else ql.binary(
    per='tensor', scale=ql.scales.absmax()
  )  # fmt: skip
  got = np.asarray(E.dorefa().simulate(jnp.asarray(w), q, {}, -2, 1))
  t = np.tanh(w.astype(np.float64))
  n = 2**bits - 1
  t = t / np.abs(t).max() / 2 + 0.5
  # Halfway between two levels float32 may take either.
  fraction = np.abs(n * t % 1 - 0.5) > 1e-4
  want = (2 * np.round(n * t) / n - 1) * w.std(dtype=np.float64)
  np.testing.assert_allclose(got[fraction], want[fraction], rtol=1e-5)


def test_warm_up_blends():
  q = ql.ternary(per='tensor')
  x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)
  hard = core.fake_quantize(x, q)

  def at(strength):
    leaf = {'strength': jnp.full((1, 1), strength)}
    return E.warm_up(E.ste()).simulate(x, q, leaf, -2, 1)

  np.testing.assert_array_equal(at(0.0), x)
  np.testing.assert_array_equal(at(1.0), hard)
  np.testing.assert_allclose(at(0.3), x + 0.3 * (hard - x), atol=1e-6)


@hypothesis.settings(deadline=None, max_examples=20)
@hypothesis.given(
  st.sampled_from(['int2', 'int4', 'odd', 'uint3']),
  st.sampled_from(['tensor', 'channel']),
  st.integers(0, 2**31),
)
def test_forward_is_the_quantizer_bit_for_bit(name, per, seed):
  """What is simulated in training is what `core.quantize` stores."""
  x = np.random.default_rng(seed).normal(size=(12, 5)).astype(np.float32)
  q = getattr(ql, name)(per=per)
  found = core.fit(jnp.asarray(x), q)
  want = core.fake_quantize(jnp.asarray(x), q, found)
  cases = [
    (E.ste(), {}),
    (E.clipped_ste(), {}),
    (E.lsq(), {'step': found.scale}),
    (E.ewgs(), {'step': found.scale}),
    (E.warm_up(E.lsq()), {'step': found.scale, 'strength': jnp.ones((1, 1))}),
  ]
  for estimator, leaves in cases:
    got = estimator.simulate(jnp.asarray(x), q, leaves, -2, 12)
    np.testing.assert_array_equal(got, want, err_msg=repr(estimator))


def test_one_step_a_seed_under_vmap():
  """vmap over models gives what one at a time does."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(3, 1, 40)), jnp.float32)
  steps = jnp.asarray([[[0.1]], [[0.2]], [[0.3]]], jnp.float32)

  def grad(x, step):
    def loss(x, step):
      y = E.ewgs(0.2).simulate(x, INT3, {'step': step}, -1, 40)
      return jnp.sum(jnp.sin(y))

    return jax.grad(loss, (0, 1))(x, step)

  together = jax.vmap(grad)(x, steps)
  for i in range(3):
    for a, b in zip(together, grad(x[i], steps[i]), strict=True):
      np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-6)


def test_a_learned_step_finds_the_best_scale():
  """On a frozen Gaussian LSQ ends near the scale of least squared error."""
  x = np.random.default_rng(0).normal(size=(1, 4096)).astype(np.float32)
  q = ql.int3(per='tensor', static=True)

  def error(step):
    y = E.lsq().simulate(jnp.asarray(x), q, {'step': step}, -1, 1)
    return jnp.mean((y - x) ** 2)

  def descend(step, _):
    return step - 0.05 * jax.grad(error)(step), None

  first = jnp.full((1, 1), np.abs(x).max() / 3)
  last, _ = jax.lax.scan(descend, first, None, 400)
  grid = np.linspace(0.2, 1.2, 400, dtype=np.float32)
  best = grid[np.argmin([((levels(x, s, -4, 3) * s - x) ** 2).mean()
                         for s in grid])]  # fmt: skip
  np.testing.assert_allclose(float(last[0, 0]), best, rtol=0.15)
