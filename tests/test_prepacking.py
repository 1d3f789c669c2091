"""Models whose weights are packed ahead are the same models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import quantlab as ql
from quantlab import core
from quantlab.runtime import checkpoint

W8A8 = ql.rule(weight=ql.int8(), input=ql.int8(per='token'))
PANELS = 'cpu.panels'


def _normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


def _tags(model):
  leaves = core.named_leaves(model.params['weights'], is_leaf=core.is_qtensor)
  return {k: q.tag for k, q in leaves if core.is_qtensor(q)}


def _equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert jax.tree.structure(a) == jax.tree.structure(b)


def _check(apply, params, batch, want, recipe=None, rtol=0.0):
  """Packs what is wanted; outputs, and what comes back, are the same."""
  model = ql.ptq(apply, params, recipe or {'.*': W8A8}, [batch])
  packed = ql.prepack(model)
  assert {k for k, tag in _tags(packed).items() if tag == PANELS} == want
  assert packed.report['prepacked']['weights'] == sorted(want)
  for run in (lambda f: f, jax.jit):
    got = run(packed.apply)(packed.params, *batch)
    expected = run(model.apply)(model.params, *batch)
    jax.tree.map(
      functools.partial(np.testing.assert_allclose, rtol=rtol, atol=rtol),
      *(got, expected),
    )
  assert ('packed ahead' in packed.summary()) == bool(want)
  assert 'packed ahead' not in model.summary()
  _equal(ql.prepack(packed).params, packed.params)
  back = ql.prepack(packed, 'canonical')
  _equal(back.params, model.params)
  assert back.report == model.report
  return model, packed


def test_dense_layers_and_no_others():
  params = {
    'kernel': _normal(0, 3, 3, 8, 64),
    'up': _normal(1, 64, 128),
    'down': _normal(2, 128, 64),
    'threebit': _normal(3, 64, 64),
    'narrow': _normal(4, 64, 10),
  }

  def apply(p, x):
    y = lax.conv_general_dilated(
      x, p['kernel'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    y = jax.nn.relu(y.mean((1, 2)) @ p['up']) @ p['down']
    return (y @ p['threebit']) @ p['narrow']

  recipe = {
    'threebit': dataclasses.replace(W8A8, weight=ql.int3()),
    '.*': W8A8,
  }
  _check(apply, params, (_normal(5, 2, 6, 6, 8),), {'up', 'down'}, recipe)


# Whether products read a weight in panels, and how its sums are made.
_READ = {
  'a column': (
    *(ql.int8(), ql.int8(symmetric=False), ql.int4(), ql.uint4()),
    *(ql.int2(), ql.ternary(), ql.fp4_e2m1(), ql.int4(per='tensor')),
  ),
  'groups': (
    *(ql.int8(group=4), ql.int4(group=8), ql.uint4(group=32), ql.mxfp4()),
    *(ql.int2(group=16), ql.ternary(group=32), ql.mxint8()),
  ),
  'no': (
    *(ql.int3(), ql.int4(group=4), ql.int2(group=8), ql.nf4(), ql.binary()),
    *(ql.odd(bits=2), ql.fp8_e4m3(), ql.uint8()),
  ),
}


@pytest.mark.parametrize(
  ('sums', 'quantizer'),
  [(sums, q) for sums, all_ in _READ.items() for q in all_],
  ids=str,
)
def test_what_products_read_in_panels(sums, quantizer):
  params = {'w': _normal(0, 64, 128)}
  rule = dataclasses.replace(W8A8, weight=quantizer)
  _check(
    *(lambda p, x: x @ p['w'], params, (_normal(1, 5, 64),)),
    set() if sums == 'no' else {'w'},
    {'w': rule},
    rtol=1e-5 if sums == 'groups' else 0,
  )


def test_stacks_that_are_scanned():
  params = {'w': _normal(0, 3, 64, 64)}

  def apply(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), x[0]), x, p['w'])

  _check(apply, params, (_normal(1, 5, 64),), {'w'})


@pytest.mark.parametrize('weight', [ql.int8(), ql.int4(group=16)], ids=str)
def test_a_tied_embedding_and_transposed_weights(weight):
  params = {'table': _normal(0, 256, 64), 'w': _normal(1, 128, 64)}

  def apply(p, ids):
    x = p['table'][ids]
    return (x @ p['w'].T) @ p['w'] @ p['table'].T

  ids = jnp.asarray([[0, 255, 63], [64, 7, 130]])
  recipe = {'.*': dataclasses.replace(W8A8, weight=weight)}
  _check(apply, params, (ids,), {'table'}, recipe, rtol=1e-5)


def test_joined_and_sliced_weights_stay():
  params = {'q': _normal(0, 64, 64), 'k': _normal(1, 64, 64)}
  params['kv'] = _normal(2, 64, 128)

  def apply(p, x):
    y = x @ jnp.concatenate([p['q'], p['k']], 1)
    return y, x @ p['kv'][:, :64], x @ p['kv'][:, 64:]

  _check(apply, params, (_normal(3, 5, 64),), set())


def test_what_is_saved_is_canonical(tmp_path):
  params = {'w': _normal(0, 64, 96)}

  def apply(p, x):
    return x @ p['w']

  model, packed = _check(apply, params, (_normal(1, 5, 64),), set())
  params = {'w': _normal(0, 64, 192)}
  model, packed = _check(apply, params, (_normal(1, 5, 64),), {'w'})
  saved = [
    checkpoint.identity(ql.save(tmp_path / name, m))
    for name, m in (('a', packed), ('b', model))
  ]
  assert saved[0] == saved[1]
  _equal(ql.load(tmp_path / 'a', apply).params, model.params)
  q = packed.params['weights']['w']
  np.testing.assert_array_equal(
    q.dequantize(), model.params['weights']['w'].dequantize()
  )


def test_columns_are_shared_among_devices():
  x, w = _normal(0, 4, 64), _normal(1, 64, 256)
  model = ql.ptq(lambda p, x: x @ p['w'], {'w': w}, {'w': W8A8}, [x])
  packed = ql.prepack(model)
  specs = jax.tree.map(
    lambda a: P('d') if a.ndim == 3 else P(None, 'd'), packed.params
  )
  mesh = Mesh(np.array(jax.devices()[:2]), 'd')
  for checked in (True, False):
    run = jax.shard_map(
      packed.apply,
      mesh=mesh,
      in_specs=(specs, P()),
      out_specs=P(None, 'd'),
      check_vma=checked,
    )
    _equal(jax.jit(run)(packed.params, x), model.apply(model.params, x))


def test_what_cannot_be_packed_is_refused():
  w = _normal(0, 64, 64)
  model = ql.ptq(
    lambda p, x: x @ p['w'], {'w': w}, {'w': W8A8}, [_normal(1, 5, 64)]
  )
  with pytest.raises(ValueError, match=r"'tpu': expected one of \['canonical'"):
    ql.prepack(model, 'tpu')
  with pytest.raises(TypeError, match=r'found dict; quantlab\.core\.prepack'):
    ql.prepack(model.params)
  for quantizer in (ql.int3(), ql.int4(group=4), ql.nf4()):
    q = core.quantize(w, quantizer, core.Layout.of(w.shape, (0,)))
    with pytest.raises(ValueError, match='integers or small floats of 8, 4 or'):
      core.prepack(q)
  packed = core.prepack(model.params['weights']['w'])
  with pytest.raises(core.LayoutError, match=r'before ql\.prepack'):
    packed.slice((0, 0), (64, 32))
