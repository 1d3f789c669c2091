"""Bit-widths as traced values: one compilation, every assignment."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from oracle import snap

import quantlab as ql

pytestmark = pytest.mark.as_for_users

X = normal(9, 4, 8)
A8 = ql.int8(per='token')
STATIC = {2: ql.int2, 3: ql.int3, 4: ql.int4, 6: ql.int6, 8: ql.int8}


def scanned(params, x):
  def layer(x, p):
    return jnp.tanh(x @ p['w']) @ p['v'], None

  return jax.lax.scan(layer, x, params)[0]


PARAMS = {'w': normal(0, 3, 8, 8), 'v': normal(1, 3, 8, 8)}


def bits_of(**found):
  return {k: {'weight': {'bits': jnp.asarray(v)}} for k, v in found.items()}


def test_one_compilation_serves_every_assignment():
  traces = []

  def apply(params, x):
    traces.append(1)
    return scanned(params, x)

  plan = ql.plan(apply, PARAMS, {'': ql.rule(weight=ql.int8(), input=A8)}, X)
  simulated = ql.fake_quantized(apply, plan)

  @jax.jit
  def run(bits):
    traces.append(2)
    return simulated({'weights': PARAMS, 'sites': bits}, X)

  traces.clear()
  for w, v in (([8, 4, 2], [3, 3, 8]), ([2, 6, 6], [8, 8, 8])):
    got = run(bits_of(w=w, v=v))
    want = X
    for i in range(3):
      h = snap.symmetric(want, 1) @ snap.symmetric(PARAMS['w'][i], 0, w[i])
      h = np.tanh(h)
      want = snap.symmetric(h, 1) @ snap.symmetric(PARAMS['v'][i], 0, v[i])
    assert snap.error(got, want) < 2e-3  # a tie may fall to the other side
  assert sorted(traces) == [1, 2]


@pytest.mark.parametrize('bits', STATIC)
def test_traced_width_is_the_static_format(bits):
  rules = {'': ql.int8(group=4, symmetric=False)}
  other = {'': STATIC[bits](group=4, symmetric=False)}
  traced = ql.fake_quantized(scanned, ql.plan(scanned, PARAMS, rules, X))
  static = ql.fake_quantized(scanned, ql.plan(scanned, PARAMS, other, X))
  state = bits_of(w=jnp.full(3, bits), v=bits)
  got = jax.jit(traced)({'weights': PARAMS, 'sites': state}, X)
  np.testing.assert_allclose(got, static(PARAMS, X), rtol=1e-4, atol=1e-4)


def test_widths_of_activations_and_of_folded_weights():
  def apply(p, x):
    return (x @ p['w'] + p['b']) * p['g']

  params = {'w': normal(0, 8, 8), 'b': normal(1, 8), 'g': normal(2, 8)}
  plan = ql.plan(apply, params, {'w': ql.rule(weight=ql.int8(), input=A8)}, X)
  assert plan.folded == {'w'}
  state = {'w': {'weight': {'bits': 3}, 'input': {'bits': 5}}}
  got = ql.fake_quantized(apply, plan)({'weights': params, 'sites': state}, X)
  w = snap.symmetric(params['w'] * params['g'], 0, 3)
  want = snap.symmetric(X, 1, 5) @ w + params['b'] * params['g']
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_widths_are_mapped_over():
  plan = ql.plan(scanned, PARAMS, {'': ql.int8()}, X)
  simulated = ql.fake_quantized(scanned, plan)

  def run(w):
    return simulated({'weights': PARAMS, 'sites': bits_of(w=w, v=8)}, X)

  population = jnp.array([[8, 8, 8], [4, 4, 4], [2, 8, 4]])
  mapped = jax.jit(jax.vmap(run))(population)
  for got, bits in zip(mapped, population, strict=True):
    np.testing.assert_allclose(got, run(bits), rtol=1e-4, atol=1e-4)


def test_a_width_for_a_second_use_is_refused():
  params = {'w': normal(0, 8, 8)}

  def apply(p, x):
    return (x @ p['w']) @ p['w']

  simulated = ql.fake_quantized(
    apply, ql.plan(apply, params, {'': ql.int8()}, X)
  )
  state = {'w:1': {'weight': {'bits': 4}}}
  with pytest.raises(ValueError, match=r"weights of \['w:1'\]"):
    simulated({'weights': params, 'sites': state}, X)
  with pytest.raises(ValueError, match=r"unknown sites \['nothing'\]"):
    simulated({'weights': params, 'sites': {'nothing': {}}}, X)
  model = ql.ptq(apply, params, {'': ql.int8()}, [X])
  with pytest.raises(TypeError, match='takes float parameters'):
    simulated(model.params, X)


def test_static_ranges_must_be_given():
  rule = ql.rule(weight=ql.int8(), input=ql.int8(per='tensor', static=True))
  plan = ql.plan(scanned, PARAMS, {'': rule}, X)
  with pytest.raises(ValueError, match=r"input of site 'w' has a static"):
    ql.fake_quantized(scanned, plan)(PARAMS, X)
