"""Trees come back as they were, or are refused with their path."""

import collections
import functools
import json
from typing import Any, NamedTuple

import flax.struct
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

import quantlab as ql
from quantlab import io, structure
from quantlab.core import Layout, quantize
from quantlab.graph.values import Dropped
from quantlab.runtime import files


def weak(*shape):
  x = jnp.full(shape, 1.5) * 2
  assert x.weak_type
  return x


def qtensor():
  w = jax.random.normal(jax.random.key(0), (2, 16, 4))
  layout = Layout.of(w.shape, k_axes=(1,), loop_axes=(0,))
  return quantize(w, ql.int3(group=8, symmetric=False), layout)


def everything():
  """A tree of all that needs no template."""
  small = np.arange(-2, 2)
  return {
    'arrays': {
      d: small.astype(jnp.dtype(d))
      for d in (
        *('bool', 'int8', 'uint16', 'int32', 'float16', 'bfloat16'),
        *('float32', 'complex64', 'float8_e4m3fn', 'float8_e5m2', 'int4'),
      )
    },
    'numbered': {10: jnp.ones(2), 2: jnp.zeros((0, 3)), -1: np.int8(7)},
    'named': {'10': jnp.ones(3), '2': None},
    'lists': [[], (), {}, [(jnp.ones(()), None)], (1,)],
    'numbers': [True, False, 0, -(2**70), 1.5, -0.0, 1e-320, float('inf')],
    'more': (float('-inf'), 2 - 3j, complex(0.0, float('inf')), 'text', ''),
    'weak': [weak(), weak(3), jnp.asarray(7)],
    'keys': [
      jax.random.key(3),
      jax.random.split(jax.random.key(4, impl='rbg')),
    ],
    'a/b': jnp.ones(1),
    'a': {'b': jnp.zeros(2), '': {'b': jnp.ones(3)}},
    '../e\u00e9': np.float32(2),
    'codes': qtensor(),
    'gone': Dropped((3, 4), 'bfloat16'),
  }


def plain(tree):
  """A comparable value that tells apart all that a checkpoint must."""
  match tree:
    case dict():
      return ['dict', [(k, type(k), plain(v)) for k, v in tree.items()]]
    case list() | tuple():
      return [type(tree), [plain(v) for v in tree]]
    case ql.QTensor():
      children, fixed = jax.tree.flatten(tree)
      return [plain(children), fixed]
    case jax.Array() if jnp.issubdtype(tree.dtype, jax.dtypes.prng_key):
      return [tree.dtype, plain(jax.random.key_data(tree))]
    case jax.Array() | np.ndarray() | np.generic():
      x = jnp.asarray(tree)
      return [x.dtype, x.weak_type, x.shape, np.asarray(x).tobytes()]
    case _:
      return [type(tree), repr(tree)]


def test_everything_returns(tmp_path):
  tree = everything()
  content = io.save_tree(tmp_path / 'ck', tree, {'step': 3})
  back, metadata = io.load_tree(tmp_path / 'ck')
  assert metadata == {'step': 3}
  for key, value in tree.items():
    assert plain(back[key]) == plain(value), key
  assert plain(back) == plain(tree)
  assert list(back['numbered']) == [10, 2, -1]
  assert isinstance(back['arrays']['int4'], jax.Array)
  names = set(content['arrays'])
  assert {'a/b', 'a/b~2', 'codes/zero_point', 'keys/0'} <= names


def test_a_tree_that_is_one_array(tmp_path):
  io.save_tree(tmp_path / 'ck', jnp.arange(3))
  assert io.load_tree(tmp_path / 'ck')[0].tolist() == [0, 1, 2]


def test_wide_arrays_keep_their_dtype(tmp_path):
  io.save_tree(tmp_path / 'ck', [np.arange(3.0), np.int64(2)])
  x, n = io.load_tree(tmp_path / 'ck')[0]
  assert (x.dtype, n.dtype, int(n)) == (np.float64, np.int64, 2)


LEAVES = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(),
  st.floats(allow_nan=False),
  st.complex_numbers(allow_nan=False),
  st.text(),
  st.integers(0, 3).map(lambda n: np.arange(n, dtype=np.int16)),
)
TREES = st.recursive(
  LEAVES,
  lambda inner: st.one_of(
    st.lists(inner, max_size=3),
    st.lists(inner, max_size=3).map(tuple),
    st.dictionaries(st.text(max_size=3), inner, max_size=3),
    st.dictionaries(st.integers(), inner, max_size=3),
  ),
  max_leaves=12,
)


@hypothesis.given(TREES)
@hypothesis.settings(deadline=None, max_examples=200)
def test_any_tree_returns_through_json(tree):
  node, arrays = structure.describe(tree)
  node = json.loads(files.dumps(node))
  assert plain(structure.rebuild(node, arrays)) == plain(tree)


class Pair(NamedTuple):
  left: Any
  right: Any


@flax.struct.dataclass
class Record:
  w: Any
  value: Any
  size: int = flax.struct.field(pytree_node=False, default=3)


@functools.partial(jax.tree_util.register_static)
class Fixed:
  pass


def module_state():
  return nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)


OTHERS = {
  'Pair': lambda: Pair(jnp.ones(2), {'x': Pair(jnp.zeros(1), None)}),
  'OrderedDict': lambda: collections.OrderedDict(b=jnp.ones(2), a=qtensor()),
  'defaultdict': lambda: collections.defaultdict(list, b=jnp.ones(2)),
  'FrozenDict': lambda: freeze({'a': {'b': jnp.ones(2)}, 'n': None}),
  'Record': lambda: Record(jnp.ones(2), [jnp.zeros(1), 4]),
  'Fixed': Fixed,
  'State': module_state,
  'dict': lambda: {(1, 2): jnp.ones(2)},
}


@pytest.mark.parametrize('name', OTHERS)
def test_other_containers_need_like(name, tmp_path):
  inner = OTHERS[name]()
  tree = {'deep': [inner, jnp.ones(1)]}
  io.save_tree(tmp_path / 'ck', tree)
  message = rf"'deep/0' is of type .*\.{name}, .* pass like="
  with pytest.raises(io.CheckpointError, match=message):
    io.load_tree(tmp_path / 'ck')
  blank = jax.tree.map(jnp.zeros_like, tree)
  back, _ = io.load_tree(tmp_path / 'ck', like=blank)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  assert type(back['deep'][0]) is type(inner)
  assert plain(jax.tree.leaves(back)) == plain(jax.tree.leaves(tree))


def test_functions_are_taken_from_like(tmp_path):
  tree = {'w': jnp.ones(2), 'activation': jax.nn.relu}
  io.save_tree(tmp_path / 'ck', tree)
  with pytest.raises(io.CheckpointError, match=r"'activation' is of .* like="):
    io.load_tree(tmp_path / 'ck')
  like = {'w': jnp.zeros(2), 'activation': jnp.tanh}
  back, _ = io.load_tree(tmp_path / 'ck', like=like)
  assert back['activation'] is jnp.tanh
  assert back['w'].tolist() == [1, 1]


def test_like_must_have_the_saved_leaves(tmp_path):
  tree = {'a': jnp.ones(2), 'b': [jnp.ones(3), 4]}
  io.save_tree(tmp_path / 'ck', tree)
  for like, message in [
    ({'a': jnp.ones(2)}, r"lacks \['b/0', 'b/1'\] \(2 in all\) and has \[\]"),
    ({**tree, 'c': 0}, r"lacks \[\] .* has \['c'\] \(1\)"),
    ({**tree, 'a': jnp.ones(5)}, r"'a' .* shape \(2,\); like= .* \(5,\)"),
  ]:
    with pytest.raises(io.CheckpointError, match=message):
      io.load_tree(tmp_path / 'ck', like=like)


@pytest.mark.parametrize(
  ('leaf', 'message'),
  [
    (np.array([None, 1]), r"'x/0' is an array of dtype .*O"),
    (np.array(['a']), r"'x/0' is an array of dtype .*U1"),
    (np.array([1], '>i4'), r'native byte order'),
    (np.zeros(2, [('a', 'f4')]), r"'x/0' is an array of dtype"),
    (np.datetime64('2020-01-01'), r"'x/0' is an array of dtype"),
    (jax.ShapeDtypeStruct((2,), 'float32'), r"'x/0' is the shape of an array"),
  ],
)
def test_leaves_that_are_no_numbers_are_refused(leaf, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    io.save_tree(tmp_path / 'ck', {'x': [leaf]})
  assert not list(tmp_path.iterdir())
