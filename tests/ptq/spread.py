"""A residual network and its batches, whole or spread over a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import quantlab as ql

RECIPE = {
  '/w': ql.rule(
    weight=ql.int4(group=8), input=ql.int8(per='tensor', static=True)
  ),
  'head': ql.rule(
    weight=ql.int8(symmetric=False),
    input=ql.int8(per='tensor', static=True, scale=ql.scales.mse()),
  ),
}
# Columns of the first product of a layer with rows of the second, as usual.
SPECS = {
  'w1': (None, 'model'),
  'w2': ('model', None),
  'b': ('model',),
  'head': (None, 'model'),
}


def layer(x, p):
  return x + jnp.tanh(x @ p['w1'] + p['b']) @ p['w2'], None


def bare(params, x):
  for p in params['layers']:
    x, _ = layer(x, p)
  return x @ params['head']


def scanned(params, x):
  return jax.lax.scan(layer, x, params['layers'])[0] @ params['head']


def setup(scan=False):
  """Function, parameters and batches, in NumPy."""
  layers = 2 if scan else 1
  draw = np.random.RandomState(0)

  def normal(scale, *shape):
    return (scale * draw.normal(size=shape)).astype(np.float32)

  stack = {
    'w1': normal(0.25, layers, 16, 32),
    'b': normal(0.2, layers, 32),
    'w2': normal(0.2, layers, 32, 16),
  }
  rows = [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(layers)]
  params = {'layers': stack if scan else rows, 'head': normal(0.25, 16, 8)}
  batches = [normal(1.0, 64, 16) for _ in range(2)]
  return (scanned if scan else bare), params, batches


def spread_batches(mesh, batches):
  """Rows along the axis 'data'."""
  return jax.tree.map(lambda x: place(mesh, P('data'), x), batches)


def spread_params(mesh, params):
  """Products along the axis 'model', layers of a stack on every device."""

  def one(path, x):
    spec = SPECS[path[-1].key]
    return place(mesh, P(*[None] * (x.ndim - len(spec)), *spec), x)

  return jax.tree_util.tree_map_with_path(one, params)


def place(mesh, spec, x):
  """A global array, of which each process makes its own parts."""
  sharding = NamedSharding(mesh, spec)
  return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])
