"""Tables of weights that an encoder makes: which encoders, on what inputs."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from graph import programs
from jax import lax

import quantlab as ql
from quantlab.search import encoded

W = programs.Random(3)
PARAMS = {'a': W(12, 8, scale=0.5), 'b': W(8, 4, scale=0.5)}
XS = [(W(16, 12, scale=1.0),) for _ in range(2)]
CHOICES = {'': [ql.int2(), ql.int4()]}


def mlp(params, x):
  return jnp.tanh(x @ params['a']) @ params['b']


def test_encoders_on_the_float_stream():
  rng = np.random.default_rng(0)
  scales = np.exp(rng.normal(size=12)).astype(np.float32)
  x = rng.normal(size=(256, 12)).astype(np.float32) * scales

  def apply(p, x):
    return jnp.tanh(x @ p['a']) @ p['b']

  params = {
    'a': rng.normal(size=(12, 8)).astype(np.float32),
    'b': rng.normal(size=(8, 4)).astype(np.float32),
  }
  recipe = {'': ql.int3()}
  plan = ql.plan(apply, params, recipe, x)

  def quantize(member):
    return ql.ptq(apply, params, recipe, [(x,)], member).params

  member = encoded.on_floats(ql.gptq(), apply, params, plan, [(x,)])
  got, walked = quantize(member), quantize(ql.gptq())
  nearest = quantize(ql.rtn())
  codes = [m['weights'] for m in (got, walked, nearest)]
  # Nothing lies before the first weight; the second sees other inputs.
  same = [np.array_equal(codes[0]['a'].codes, c['a'].codes) for c in codes[1:]]
  assert same == [True, False]
  hidden = np.tanh(x @ params['a'])
  off = [
    np.square(hidden @ (c['b'].dequantize() - params['b'])).sum() for c in codes
  ]
  assert off[0] < off[2]


def test_a_column_may_be_all_float():
  choices = {'': [None, ql.int3()]}
  table = ql.sensitivity(mlp, PARAMS, choices, XS, 'kl', encode=ql.gptq())
  assert [r.options for r in table.rows] == [('float', 'int3')] * 2
  for value in table.values:
    assert value[0] == 0 < value[1]


def test_gptq_of_a_table_is_gptq_of_the_float_stream():
  """The first weight's entry is the model that `ql.ptq` makes of it alone."""
  table = ql.sensitivity(mlp, PARAMS, CHOICES, XS, 'kl', encode=ql.gptq())
  for k, q in enumerate(CHOICES['']):
    model = ql.ptq(mlp, PARAMS, {'/a$': q}, XS, ql.gptq())
    kls = []
    for (x,) in XS:
      p, r = (
        np.asarray(f(v, x), np.float64)
        for f, v in ((mlp, PARAMS), (model.apply, model.params))
      )
      p, r = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (p, r))
      kls.append((np.exp(p) * (p - r)).sum(-1))
    assert table.values[0][k] == pytest.approx(np.mean(kls), rel=1e-3)


def test_only_encoders_of_single_weights_are_taken():
  def measure(encode):
    return ql.sensitivity(mlp, PARAMS, CHOICES, XS, 'kl', encode=encode)

  for wrong in (
    ql.awq(),
    ql.cross_layer_equalization(),
    (ql.awq(), ql.gptq()),
    lambda plan: ql.ptq(mlp, PARAMS, plan, XS).params,
  ):
    with pytest.raises(TypeError, match='one member of a chain that makes'):
      measure(wrong)
  rounded = ql.rtn()

  def eight_bits(target, stat, key):
    storage = dataclasses.replace(target.storage, quantizer=ql.int8())
    return rounded.encode(
      dataclasses.replace(target, storage=storage), stat, key
    )

  def nothing(target, stat, key):
    return None, {}

  for encode, found in ((eight_bits, 'int8'), (nothing, 'NoneType')):
    with pytest.raises(ValueError, match=f"mine makes {found}.*'a'; the plan"):
      measure(dataclasses.replace(rounded, name='mine', encode=encode))


def test_layers_of_a_scan_are_encoded_one_by_one():
  """A table of a scanned model is that of the loop written out."""
  stack = jnp.stack([W(8, 8, scale=0.5) for _ in range(3)])
  head = W(8, 4, scale=0.5)
  apart = {'layers': [{'w': w} for w in stack], 'head': head}
  together = {'layers': {'w': stack}, 'head': head}
  scales = np.exp(np.arange(8) / 3)
  xs = [(W(64, 8, scale=1.0) * scales,) for _ in range(2)]

  def layer(x, p):
    return x + jnp.tanh(x @ p['w']), None

  def scanned(p, x):
    return lax.scan(layer, x, p['layers'])[0] @ p['head']

  def loop(p, x):
    for one in p['layers']:
      x, _ = layer(x, one)
    return x @ p['head']

  def measure(apply, params, encode, **more):
    return ql.sensitivity(
      apply, params, CHOICES, xs, 'kl', encode=encode, **more
    )

  theirs = measure(loop, apart, ql.gptq())
  ours = measure(scanned, together, ql.gptq(), layers=True)
  where = {r.name: v for r, v in zip(theirs.rows, theirs.values, strict=True)}
  for row, value in zip(ours.rows, ours.values, strict=True):
    name = f'layers/{row.name[-2]}/w' if '[' in row.name else row.name
    np.testing.assert_allclose(value, where[name], rtol=1e-3)
  rounded = measure(scanned, together, ql.rtn(), layers=True)
  assert sum(v[1] for v in ours.values) < sum(v[1] for v in rounded.values)


def test_nested_scans_are_refused():
  stack = jnp.stack([jnp.stack([W(8, 8), W(8, 8)]) for _ in range(2)])
  params = {'w': stack, 'head': W(8, 4)}

  def inner(x, w):
    return jnp.tanh(x @ w), None

  def apply(p, x):
    def outer(x, w):
      return lax.scan(inner, x, w)[0], None

    return lax.scan(outer, x, p['w'])[0] @ p['head']

  with pytest.raises(ValueError, match=r"gptq .* 'w' is in nested scans over"):
    ql.sensitivity(
      apply, params, CHOICES, [(W(16, 8),)], 'kl', encode=ql.gptq()
    )
