"""A quantized model's parameters are an ordinary tree of arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import normal
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import quantlab as ql

pytestmark = pytest.mark.as_for_users

RULE = ql.rule(
  weight=ql.int4(group=4), input=ql.int8(per='tensor', static=True)
)


X = normal(9, 4, 8)
PARAMS = {'w': normal(0, 8, 8), 'g': normal(1, 8), 'v': normal(2, 8, 8)}


def apply(p, x):
  return jnp.tanh((x @ p['w']) * p['g']) @ p['v']


@pytest.fixture(scope='module')
def model():
  return ql.ptq(apply, PARAMS, {'w|v': RULE}, [X])


@pytest.fixture(scope='module')
def want(model):
  return model.apply(model.params, X)


def test_leaves_are_arrays(model):
  assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(model.params))
  assert set(model.params) == {'weights', 'sites', 'effective'}
  paths = [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(model.params)
  ]
  assert paths == [
    'effective/w/codes',
    'effective/w/scale',
    'sites/v/input/scale',
    'sites/w/fold/shift',
    'sites/w/input/scale',
    'weights/v/codes',
    'weights/v/scale',
  ]


def test_map_flatten_and_unflatten(model, want):
  copied = jax.tree.map(jnp.copy, model.params)
  np.testing.assert_array_equal(model.apply(copied, X), want)
  leaves, tree = jax.tree.flatten(model.params)
  again = jax.tree.unflatten(tree, leaves)
  np.testing.assert_array_equal(model.apply(again, X), want)
  assert tree == jax.tree.structure(copied)
  assert hash(tree) == hash(jax.tree.structure(copied))


def test_numpy_leaves(model, want):
  on_host = jax.device_get(model.params)
  np.testing.assert_array_equal(model.apply(on_host, X), want)


def test_jit_donates_and_returns_them(model, want):
  @jax.jit
  def step(params, x):
    return model.apply(params, x), params

  out, params = step(model.params, X)
  np.testing.assert_array_equal(out, want)
  jax.tree.map(np.testing.assert_array_equal, params, model.params)
  donated = jax.jit(step, donate_argnums=0)
  out, params = donated(jax.tree.map(jnp.copy, model.params), X)
  np.testing.assert_array_equal(out, want)
  np.testing.assert_array_equal(model.apply(params, X), want)


def test_device_put_with_shardings(model, want):
  mesh = Mesh(np.array(jax.devices()[:8]), ('model',))
  replicated = NamedSharding(mesh, P())
  everywhere = jax.device_put(model.params, replicated)
  np.testing.assert_array_equal(model.apply(everywhere, X), want)

  def columns(path, x):
    coded = jax.tree_util.keystr(path).endswith('.codes')
    spec = P(None, 'model') if coded else P()
    return jax.device_put(x, NamedSharding(mesh, spec))

  split = jax.tree_util.tree_map_with_path(columns, model.params)
  out = jax.jit(model.apply)(split, jax.device_put(X, replicated))
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)


def test_shapes_alone(model):
  shapes = jax.eval_shape(lambda p: p, model.params)
  assert shapes['weights']['v'].nbytes == model.params['weights']['v'].nbytes
  out = jax.eval_shape(
    model.apply, shapes, jax.ShapeDtypeStruct((2, 8), X.dtype)
  )
  assert out.shape == (2, 8)


def test_a_part_of_the_variables_is_refused(model):
  with pytest.raises(
    ValueError, match=r"lack the effective weights of \['w'\]"
  ):
    model.apply(model.params['weights'], X)
  rest = {**model.params, 'sites': {}}
  with pytest.raises(ValueError, match=r"input of site 'w' has a static"):
    model.apply(rest, X)


def test_bytes_are_those_of_the_leaves(model):
  assert model.nbytes == sum(x.nbytes for x in jax.tree.leaves(model.params))
