"""Searches that decide the layers of a scan one by one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph import programs
from jax import lax

import quantlab as ql
from quantlab import search

W = programs.Random(5)


def test_a_row_for_each_layer_of_a_scan():
  """As of the unrolled model, and deployed as it was chosen."""
  keys = jax.random.split(jax.random.key(5), 4)
  stack = jnp.stack([W(8, 8) for _ in range(3)])
  stack = stack * jnp.array([0.02, 1.0, 2.0])[:, None, None]
  scanned = {'layers': {'w': stack}, 'head': W(8, 5)}
  unrolled = {'layers': [{'w': w} for w in stack], 'head': scanned['head']}
  batches = [(jax.random.normal(k, (16, 8)),) for k in keys]

  def scan(p, x):
    def layer(x, w):
      return x + jnp.tanh(x @ w['w']), None

    return lax.scan(layer, x, p['layers'])[0] @ p['head']

  def loop(p, x):
    for w in p['layers']:
      x = x + jnp.tanh(x @ w['w'])
    return x @ p['head']

  choices = {'w$': [ql.int2(), ql.int4(), ql.int6()], 'head': ql.int8()}
  names = ('kl', 'output_mse', 'weight_error', 'hessian', 'fisher')
  ours = ql.sensitivity(scan, scanned, choices, batches, names, layers=True)
  theirs = ql.sensitivity(loop, unrolled, choices, batches, names)
  for name in names:
    assert [r.name for r in ours[name].rows] == [
      f'layers/w[{i}]' for i in range(3)
    ]
    np.testing.assert_allclose(
      np.concatenate(ours[name].values),
      np.concatenate(theirs[name].values),
      rtol=2e-3,
      atol=1e-6,
    )
  again = search.Table.from_json(json.loads(json.dumps(ours['kl'].to_json())))
  budget = ours['kl'].cost((1, 1, 1))
  found = ql.allocate(again, budget)
  assert len(set(found.choice)) > 1
  model = ql.ptq(scan, scanned, found, batches)
  twin = ql.ptq(loop, unrolled, ql.allocate(theirs['kl'], budget), batches)
  np.testing.assert_allclose(
    model.apply(model.params, *batches[0]),
    twin.apply(twin.params, *batches[0]),
    atol=1e-5,
  )
  assert model.nbytes == found.costs['bytes'] <= budget
  with pytest.raises(ValueError, match='no site with several options is in a'):
    ql.sensitivity(loop, unrolled, choices, batches, layers=True)
