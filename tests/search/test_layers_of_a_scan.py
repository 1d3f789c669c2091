"""Searches that decide the layers of a scan one by one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from graph import programs
from jax import lax

import quantlab as ql
from quantlab import quality, search

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
  names = ('kl', 'output_mse', 'weight_error', 'hessian')
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


def residual(p, x):
  def layer(x, p):
    return x + jnp.tanh(x @ p['w']) @ p['v'], None

  return lax.scan(layer, x, p['layers'])[0] @ p['head']


def loop_of_residual(p, x):
  for layer in p['layers']:
    x = x + jnp.tanh(x @ layer['w']) @ layer['v']
  return x @ p['head']


def drawn(seed, gains):
  w = programs.Random(seed)
  v = jnp.asarray(gains)[:, None, None] * w(3, 6, 6, scale=0.6)
  return {'layers': {'w': w(3, 6, 6, scale=0.6), 'v': v}, 'head': w(6, 4)}


def test_traces_and_relevance_of_layers():
  params = drawn(1, [1.0, 1.0, 1.0])
  apart = [
    jax.tree.map(lambda a, i=i: a[i], params['layers']) for i in range(3)
  ]
  flat = {'layers': apart, 'head': params['head']}
  x = programs.Random(2)(8, 6, scale=1.0)
  batches = [(x, np.asarray(residual(params, x).argmax(-1)))]
  options = {
    'metric': ('trace', 'lrp'),
    'task': quality.classification,
    'probes': 300,
  }
  choices = {'': [ql.int2(), ql.int4()]}
  ours = ql.sensitivity(
    residual, params, choices, batches, layers=True, **options
  )
  theirs = ql.sensitivity(loop_of_residual, flat, choices, batches, **options)
  rows = [r.name for r in theirs['lrp'].rows]
  at = [
    rows.index(f'layers/{name[9]}/{name[7]}' if '[' in name else name)
    for name in (r.name for r in ours['lrp'].rows)
  ]
  np.testing.assert_allclose(
    ours['lrp'].values, np.array(theirs['lrp'].values)[at], rtol=1e-4
  )
  mine, other = (np.array(t['trace'].values) for t in (ours, theirs))
  errors = np.hypot(
    ours['trace'].stderr, np.array(theirs['trace'].stderr)[at]
  )  # other probes
  assert np.all(np.abs(mine - other[at]) < 5 * errors)
  traces = json.loads(json.dumps(ours['trace'].to_json()))['facts']['traces']
  assert len(traces) == 7


@pytest.mark.parametrize('seed', range(3))
def test_layers_that_differ_are_told_apart(seed):
  """One layer of three matters by construction; at the bytes of uniform."""
  params = drawn(seed, np.roll([1.0, 0.02, 0.02], seed))
  w = programs.Random(10 + seed)
  batches, held_out = [w(32, 6, scale=1.0)], w(256, 6, scale=1.0)
  formats = [ql.int2(), ql.int3(), ql.int4(), ql.int6()]
  choices = {'/layers': formats, 'head': ql.int8()}
  table = ql.sensitivity(residual, params, choices, batches, layers=True)
  uniform = table.cost(table.uniform('int3'))
  found = ql.allocate(table, uniform)

  def divergence(recipe):
    model = ql.ptq(residual, params, recipe, batches)
    assert model.nbytes <= uniform
    p, q = (
      jax.nn.log_softmax(z)
      for z in (
        residual(params, held_out),
        model.apply(model.params, held_out),
      )
    )
    return float((jnp.exp(p) * (p - q)).sum(-1).mean())

  plain = divergence({'/layers': ql.int3(), 'head': ql.int8()})
  assert divergence(found) < 0.7 * plain
  with pytest.raises(ValueError, match=r"some layers of 'layers/w' and lacks"):
    _ = ql.allocate(table.select(r'\[0\]'), uniform).recipe
