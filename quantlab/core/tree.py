"""Paths and sizes of parameter trees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import tree_util

from quantlab.core.qtensor import QTensor


def path_str(keypath: Sequence[Any]) -> str:
  """Joins a key path: 'params/block_0/kernel', 'layers/3/w'.

  Dictionary keys, attribute names and indices alike; the trailing attribute
  `value` of an NNX variable is dropped.
  """
  last = keypath[-1] if keypath else None
  if isinstance(last, tree_util.GetAttrKey) and last.name == 'value':
    keypath = keypath[:-1]
  return '/'.join(map(_part, keypath))


def _part(key: Any) -> str:
  for name in ('key', 'name', 'idx'):
    if hasattr(key, name):
      return str(getattr(key, name))
  return str(key)


def is_qtensor(x: Any) -> bool:
  """Whether x is a quantized array."""
  return isinstance(x, QTensor)


def named_leaves(tree: Any, is_leaf=is_qtensor) -> list[tuple[str, Any]]:
  """(path, leaf) of every leaf, quantized arrays whole, in tree order."""
  flat, _ = tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  return [(path_str(path), leaf) for path, leaf in flat]


def nbytes(tree: Any) -> int:
  """Bytes of all arrays, of shapes alone too; other leaves take none."""
  return sum(
    math.prod(x.shape) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
    if hasattr(x, 'shape') and hasattr(x, 'dtype')
  )


@jax.jit  # once for all calls with arrays of the same shapes
def _finite(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
  return {k: jnp.isfinite(x).all() for k, x in arrays.items()}


def nonfinite(named: Mapping[str, Any]) -> list[str]:
  """The names of those floating-point arrays that hold NaN or infinity."""
  floats = {
    k: x
    for k, x in named.items()
    if not is_qtensor(x)
    and hasattr(x, 'dtype')
    and jnp.issubdtype(x.dtype, jnp.floating)
  }
  return [k for k, fine in jax.device_get(_finite(floats)).items() if not fine]
