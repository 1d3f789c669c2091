"""What is saved comes back bit for bit, from version 1 on.

The folder data/checkpoint_v1 and the numbers beside it were written once by
version 1, and every later version must read them:

    PYTHONPATH=tests python -c 'import test_io; test_io.write_version_1()'
"""

import dataclasses
import math
import pathlib
import shutil
import tempfile
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from flax.core import FrozenDict, freeze
from jax.sharding import NamedSharding, PartitionSpec
from oracle import snap

import quantlab as ql
from quantlab import io
from quantlab.core import presets
from quantlab.graph.values import Dropped
from quantlab.models import layers
from quantlab.models.transformer import Transformer
from quantlab.runtime import checkpoint, files
from quantlab.runtime import mesh as mesh_lib

DATA = pathlib.Path(__file__).parent / 'data'
CheckpointError = io.CheckpointError


def bits(tree):
  """Everything about the leaves of a tree that could change a result."""
  return [
    (x.dtype, x.shape, x.weak_type, np.asarray(x).tobytes())
    for x in map(jnp.asarray, jax.tree.leaves(tree))
  ]


def assert_same(model, back, *args, **options):
  assert jax.tree.structure(back.params) == jax.tree.structure(model.params)
  assert bits(back.params) == bits(model.params)
  assert back.plan.to_json() == model.plan.to_json()
  assert back.report == files.to_jsonable(model.report)
  first, second = (
    jax.jit(m.apply, **options)(m.params, *args) for m in (model, back)
  )
  assert bits(first) == bits(second)


def qtensors(model):
  found = jax.tree.leaves(
    model.params, is_leaf=lambda x: isinstance(x, ql.QTensor)
  )
  return [x for x in found if isinstance(x, ql.QTensor)]


# Models -----------------------------------------------------------------------


def transformer(scanned):
  tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 32)
  net = Transformer(
    vocab=32, dim=16, heads=2, blocks=1 + scanned, context=8, scanned=scanned
  )
  params = net.init(jax.random.key(1), tokens)
  recipe = {'/head/': ql.int8(), '/kernel$': ql.int4(group=8)}
  return net.apply, params, recipe, (tokens,)


def unrolled():
  return transformer(scanned=False)


def scanned():
  return transformer(scanned=True)


def convolutional():
  """Folded norms (effective weights, dropped leaves) and static ranges."""

  def apply(params, x):
    for p in params['blocks']:
      y = layers.batch_norm(p['bn'], layers.conv(p['conv'], x), epsilon=1e-3)
      x = jax.nn.relu(y)
    return layers.dense(params['head'], x.mean((1, 2)))

  def block(i, n):
    bn = {
      k: 1 + 0.1 * normal(i + j, n) for j, k in enumerate(('scale', 'bias'))
    }
    bn |= {'mean': normal(i + 2, n), 'var': jnp.exp(normal(i + 3, n))}
    return {'conv': {'kernel': normal(i + 4, 3, 3, 3, n)}, 'bn': bn}

  params = {
    'blocks': (block(10, 3), block(20, 3)),
    'head': {'kernel': normal(30, 3, 4), 'bias': normal(31, 4)},
  }
  static = ql.int8(per='tensor', static=True, symmetric=False)
  rule = ql.rule(weight=ql.int8(), input=static)
  return apply, params, {'kernel$': rule}, (normal(0, 2, 6, 6, 3),)


def captured():
  params = {'w': normal(1, 16, 16), 'b': normal(2, 16)}

  def apply(_, x):  # uses what it closed over
    return jnp.tanh(x @ params['w'] + params['b'])

  return apply, params, {'w$': ql.int4()}, (normal(0, 4, 16),)


def dynamic():
  """Codes times codes, a weight used twice, Python and weak numbers."""
  params = {
    'w': normal(1, 16, 16).astype(jnp.bfloat16),
    'gain': 3,
    'weak': jnp.asarray(0.5),  # a strong one would make everything float32
    'none': None,
  }

  def apply(params, x):
    for _ in range(2):
      x = jnp.tanh(params['gain'] * params['weak'] * (x @ params['w']))
    return x

  rule = ql.rule(weight=ql.int8(), input=ql.int8(per='token'))
  return apply, params, {'w$': rule}, (normal(0, 4, 16).astype(jnp.bfloat16),)


MODELS = [unrolled, scanned, convolutional, captured, dynamic]


@pytest.mark.parametrize('make', MODELS)
def test_models_return_bit_for_bit(make, tmp_path):
  apply, params, recipe, args = make()
  model = ql.ptq(apply, params, recipe, [args])
  content = ql.save(tmp_path / 'ck', model)
  back = ql.load(tmp_path / 'ck', apply)
  assert_same(model, back, *args)
  check_sizes(model, content)
  if make is convolutional:
    leaves = jax.tree.leaves(
      back.params['weights'], is_leaf=lambda x: isinstance(x, Dropped)
    )
    assert sum(isinstance(x, Dropped) for x in leaves) == 10
    assert len(back.params['effective']) == 2
    assert 'input' in back.params['sites']['blocks/0/conv/kernel']


def check_sizes(model, content):
  """Every account of a model's size is the same number."""
  for q in qtensors(model):
    children = jax.tree.leaves(q)
    assert q.nbytes == sum(np.asarray(c).nbytes for c in children)
    assert math.isclose(q.bits_per_weight * q.size / 8, q.nbytes, rel_tol=1e-15)
    assert q.codes.nbytes == math.prod(q.loops) * q.columns * math.ceil(
      q.k * q.quantizer.bits / 8
    )
  stored = {k: d['nbytes'] for k, d in content['arrays'].items()}
  coded = [n for k, n in stored.items() if k.endswith(CHILDREN)]
  assert sum(coded) == sum(q.nbytes for q in qtensors(model))
  assert sum(stored.values()) == model.nbytes
  assert content['metadata']['nbytes'] == model.nbytes


CHILDREN = tuple(
  f'{where}/{child}'
  for where in ('kernel', 'w', 'conv/kernel')
  for child in ('codes', 'scale', 'zero_point')
)


def test_size_on_disk_is_that_of_the_codes(tmp_path):
  params = {'w': normal(0, 1024, 2048)}
  model = ql.ptq(
    lambda p, x: x @ p['w'],
    params,
    {'w': ql.int4(group=32)},
    [normal(1, 1, 1024)],
  )
  ql.save(tmp_path / 'ck', model)
  found = [p for p in (tmp_path / 'ck').rglob('*') if p.is_file()]
  size = sum(p.stat().st_size for p in found)
  assert model.nbytes == 1024 * 2048 // 2 + 4 * 32 * 2048
  # The store compresses; the manifest takes a few thousand bytes.
  assert 0.8 * model.nbytes < size < 1.01 * model.nbytes + 20_000


def every_quantizer():
  """Each preset as it comes, and the other granularities and scales."""
  found = {
    name: f()
    for name, f in vars(ql).items()
    if isinstance(f, types.FunctionType) and f.__module__ == presets.__name__
  }
  return found | {
    'asymmetric': ql.int3(group=32, symmetric=False),
    'ragged': ql.int4(group=48, ragged=True),
    'block': ql.fp8_e4m3(block=(32, 8)),
    'tensor': ql.uint8(per='tensor', symmetric=False),
    'bf16': ql.int6(scale_format='bfloat16', narrow=True),
    'stochastic': ql.int4(rounding='stochastic'),
    'pow2_3': ql.pow2(bits=3),
    'codebook_2': ql.codebook(bits=2, per='tensor'),
    'mxfp8_e5m2': ql.mxfp8(element='e5m2'),
    'mxfp6_e3m2': ql.mxfp6(element='e3m2'),
  }


def test_every_format_returns_bit_for_bit(tmp_path):
  quantizers = every_quantizer()
  assert len(quantizers) > 36
  params = {
    name: {'w': normal(i, 128, 16)} for i, name in enumerate(quantizers)
  }

  def apply(params, x):
    return {name: x @ p['w'] for name, p in params.items()}

  recipe = {f'/{name}/': q for name, q in quantizers.items()}
  x = normal(99, 2, 128)
  model = ql.ptq(apply, params, recipe, [x], key=jax.random.key(0))
  ql.save(tmp_path / 'ck', model)
  back = ql.load(tmp_path / 'ck', apply)
  faster = {'xla_backend_optimization_level': 0}  # compiled in a fifth
  assert_same(model, back, x, compiler_options=faster)
  for name, q in quantizers.items():
    assert back.params['weights'][name]['w'].quantizer == q


def test_sharded_models(tmp_path):
  mesh = mesh_lib.make_mesh(d=8)
  apply = lambda p, x: x @ p['w']  # noqa: E731
  x = normal(1, 4, 64)
  model = ql.ptq(apply, {'w': normal(0, 64, 32)}, {'w': ql.int4(group=16)}, [x])

  def where(name, shape):
    wide = len(shape) == 2 and shape[-1] % 8 == 0
    return NamedSharding(
      mesh, PartitionSpec(None, 'd') if wide else PartitionSpec()
    )

  weights = jax.tree.map(
    lambda c: jax.device_put(c, where('', c.shape)), model.params['weights']
  )
  spread = dataclasses.replace(
    model, params={**model.params, 'weights': weights}
  )
  ql.save(tmp_path / 'ck', spread)
  seen = []

  def asked(name, shape):
    seen.append((name, shape))
    return where(name, shape)

  back = ql.load(tmp_path / 'ck', apply, sharding=asked)
  assert seen == [('weights/w/codes', (32, 32)), ('weights/w/scale', (4, 32))]
  assert bits(back.params) == bits(model.params)
  codes = back.params['weights']['w'].codes
  assert codes.sharding == where('', codes.shape)
  assert codes.addressable_shards[0].data.shape == (32, 4)
  assert_same(spread, back, x)
  everywhere = NamedSharding(mesh, PartitionSpec())
  back = ql.load(tmp_path / 'ck', apply, sharding=everywhere)
  assert back.params['weights']['w'].scale.sharding == everywhere
  assert_same(model, ql.load(tmp_path / 'ck', apply), x)


def test_missing_ranges_are_refused(tmp_path):
  apply, params, recipe, args = convolutional()
  found = ql.ptq(apply, params, recipe, [args])
  for key, message in [
    ('sites', r"input/scale of site 'blocks/0/conv/kernel' is absent, planned"),
    ('effective', "'blocks/0/conv/kernel' is planned as int8.*found nothing"),
  ]:
    other = dataclasses.replace(found, params={**found.params, key: {}})
    with pytest.raises(ValueError, match=message):
      ql.save(tmp_path / 'ck', other)


def test_containers_that_a_name_cannot_rebuild_need_like(tmp_path):
  net = nn.Dense(8)
  x = normal(1, 4, 16)
  params = freeze(net.init(jax.random.key(0), x))
  model = ql.ptq(net.apply, params, {'kernel$': ql.int4(group=8)}, [x])
  ql.save(tmp_path / 'ck', model)
  message = r"'weights' is of type .*FrozenDict, .* pass like="
  with pytest.raises(CheckpointError, match=message):
    ql.load(tmp_path / 'ck', net.apply)
  shapes = jax.eval_shape(lambda: params)
  back = ql.load(tmp_path / 'ck', net.apply, like=shapes)
  assert isinstance(back.params['weights'], FrozenDict)
  assert_same(model, back, x)
  # Filled into what the reader has, whatever its containers are.
  back = ql.load(tmp_path / 'ck', net.apply, like=shapes.unfreeze())
  assert type(back.params['weights']) is dict
  for like, message in [
    ({'params': {'kernel': jnp.ones((16, 8))}}, r"lacks \['params/bias'\]"),
    (jax.eval_shape(net.init, jax.random.key(0), x[:, :4]), r'shape \(4, 8\)'),
  ]:
    with pytest.raises(CheckpointError, match=message):
      ql.load(tmp_path / 'ck', net.apply, like=like)


# Version 1, for ever ----------------------------------------------------------


def version_1(params, x):
  """The model that data/checkpoint_v1 holds."""
  first, second = params['layers']
  x = x @ first['w'] * params['gain'] + params['biases'][0].astype(x.dtype)
  x = jnp.tanh(x)
  return x @ second['w']


def write_version_1():
  """Writes the checkpoint and the numbers that NumPy expects of it."""
  rng = np.random.default_rng(1)
  a, b = (rng.normal(size=s).astype(np.float32) for s in ((8, 8), (8, 4)))
  bias = rng.normal(size=8).astype(jnp.bfloat16)
  x = rng.normal(size=(3, 8)).astype(np.float32)
  params = {
    'layers': ({'w': jnp.asarray(a), 'none': None}, {'w': jnp.asarray(b)}),
    'biases': {0: jnp.asarray(bias)},
    'gain': 0.5,
  }
  recipe = {'0/w$': ql.int4(group=4), '1/w$': ql.int8()}
  model = ql.ptq(version_1, params, recipe, [x])
  with tempfile.TemporaryDirectory() as folder:  # orbax notes absolute paths
    ql.save(pathlib.Path(folder) / 'ck', model)
    shutil.copytree(pathlib.Path(folder) / 'ck', DATA / 'checkpoint_v1')
  a_hat = snap.symmetric(a.reshape(2, 4, 8), 1, bits=4).reshape(8, 8)
  b_hat = snap.symmetric(b, 0)

  def run(a, b):
    h = np.tanh(x.astype(np.float64) @ a * 0.5 + bias.astype(np.float64))
    return h @ b

  np.savez_compressed(
    DATA / 'checkpoint_v1_expected.npz',
    **{'x': x, 'a': a, 'b': b, 'a_hat': a_hat, 'b_hat': b_hat},
    **{'float_out': run(a, b), 'quantized_out': run(a_hat, b_hat)},
  )


def test_version_1_is_read_for_ever():
  assert checkpoint.read_manifest(DATA / 'checkpoint_v1')['version'] == 1
  model = ql.load(DATA / 'checkpoint_v1', version_1)
  with np.load(DATA / 'checkpoint_v1_expected.npz') as stored:
    want = dict(stored)
  first, second = model.params['weights']['layers']
  np.testing.assert_array_equal(first['w'].dequantize(), want['a_hat'])
  np.testing.assert_array_equal(second['w'].dequantize(), want['b_hat'])
  assert first['w'].quantizer == ql.int4(group=4)
  assert first['none'] is None
  assert model.params['weights']['biases'][0].dtype == jnp.bfloat16
  assert type(model.params['weights']['gain']) is float
  out = jax.jit(model.apply)(model.params, want['x'])
  np.testing.assert_allclose(out, want['quantized_out'], rtol=1e-5, atol=1e-5)
  assert 1e-3 < snap.error(out, want['float_out']) < 0.2
