"""Relevance of sites, and what is made of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph import programs

import quantlab as ql
from quantlab.search.simulate import Relevance

W = programs.Random(5)
PARAMS = {'a': W(4, 5, scale=0.9), 'b': W(5, 3, scale=0.9)}
XS = [W(6, 4, scale=1.0) for _ in range(3)]


def mlp(params, x):
  return jnp.tanh(x @ params['a']) @ params['b']


def test_relevance_is_conserved():
  """All weights and inputs positive: every layer hands on all of it."""
  params = {k: jnp.abs(v) for k, v in PARAMS.items()}

  def relu(p, x):
    return jax.nn.relu(jax.nn.relu(jnp.abs(x) @ p['a']) @ p['b'])

  formats = [
    ql.int2(),
    ql.rule(weight=ql.int4(), input=ql.int8(per='token')),
    None,
  ]
  tables = ql.sensitivity(relu, params, {'': formats}, XS, ('lrp', 'lrp_bits'))
  table = tables['lrp']
  found = table.facts['relevance']
  assert found['a'] == pytest.approx(0.5, abs=0.005)
  shares = np.outer([found['a'], found['b']], [1, 1, 1])
  np.testing.assert_allclose(
    table.values, shares * [4**-2, 4**-4 + 4**-8, 0], rtol=1e-6
  )
  np.testing.assert_allclose(
    tables['lrp_bits'].values, shares * [14, 10, 0], rtol=1e-6
  )
  # Without positive weights relevance cancels, and is not the same.
  other = ql.sensitivity(mlp, PARAMS, {'': [ql.int2(), ql.int4()]}, XS, 'lrp')
  assert abs(other.facts['relevance']['a'] - 0.5) > 0.01
  # The epsilon rule against its definition.
  z = jnp.array([1.0, -2.0, 0.5])
  eps = Relevance(0.1)

  def f(z, slot):
    leaves = {'alpha': slot}
    y = eps('s', 'output', z, None, leaves, axis=-1, shape=z.shape)
    return (y * jnp.array([1.0, 2.0, -1.0])).sum()

  g, slot = jax.grad(f, (0, 1))(z, jnp.zeros(()))
  floor = 0.1 * np.sqrt(np.mean(np.square(z)))
  want = np.array([1.0, 2.0, -1.0]) * np.abs(z) / (np.abs(z) + floor)
  np.testing.assert_allclose(g, want, rtol=1e-5)
  assert slot == pytest.approx(1.0 + 4.0 + 0.5)
