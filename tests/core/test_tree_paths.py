"""Paths and sizes of parameter trees."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from quantlab import core
from quantlab.core import Layout, presets

Pair = collections.namedtuple('Pair', ['w', 'b'])


def tensor():
  w = jnp.ones((8, 4))
  return core.quantize(w, presets.int4(), Layout.of(w.shape, (0,)))


def test_paths_of_containers():
  tree = {
    'params': {'block_0': {'kernel': 1, 'value': 2}},
    'layers': [{'w': 3}, Pair(4, 5)],
  }
  paths = [path for path, _ in core.named_leaves(tree)]
  assert paths == [
    'layers/0/w',
    'layers/1/w',
    'layers/1/b',
    'params/block_0/kernel',
    'params/block_0/value',
  ]


def test_nnx_paths_drop_value():
  state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
  assert sorted(p for p, _ in core.named_leaves(state)) == ['bias', 'kernel']


def test_quantized_leaves_stay_whole():
  tree = {'a': tensor(), 'b': jnp.zeros(3, jnp.bfloat16), 'c': 1.0}
  leaves = dict(core.named_leaves(tree))
  assert set(leaves) == {'a', 'b', 'c'}
  assert core.is_qtensor(leaves['a'])


def test_nbytes():
  tree = {'a': tensor(), 'b': jnp.zeros(3, jnp.bfloat16)}
  assert core.nbytes(tree) == 8 * 4 // 2 + 4 * 4 + 6
  shapes = jax.eval_shape(lambda: tree)
  assert core.nbytes(shapes) == core.nbytes(tree)
  assert core.nbytes(np.zeros((2, 3), np.int8)) == 6
  # Wide arrays as they are, random keys; what is no array takes nothing.
  mixed = [np.zeros(2), jax.random.key(0), 1.5, 'text', jax.nn.relu]
  assert core.nbytes(mixed) == 16 + 8
