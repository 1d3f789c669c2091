"""Layout-only operations on quantized values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from quantlab import core
from quantlab.core import Layout, LayoutError, QTensor


def _slice(eqn, vals):
  p = eqn.params
  if p['strides'] is not None and any(s != 1 for s in p['strides']):
    raise LayoutError('a strided slice')
  return vals[0].slice(p['start_indices'], p['limit_indices'])


def _dynamic_slice(eqn, vals):
  """A dynamic index along loop axes slices every child alike."""
  q, starts = vals[0], vals[1:]
  sizes = eqn.params['slice_sizes']
  place = q.layout.full(len(q.loops))
  for axis, (size, full) in enumerate(zip(sizes, q.shape, strict=True)):
    if size == full:
      continue
    loop = place[axis] + q.ndim
    if loop >= len(q.loops):
      raise LayoutError('a dynamic slice of an axis that is not a loop axis')
    q = jax.tree.map(
      lambda c, s=starts[axis], n=size, a=loop: lax.dynamic_slice_in_dim(
        c, s, n, a
      ),
      q,
    )
  return q


def _squeeze(eqn, vals):
  """Drops axes of length one; a loop axis (indexed layer) in all children."""
  q, axes = vals[0], sorted(a % vals[0].ndim for a in eqn.params['dimensions'])
  for axis in reversed(axes):
    loop = q.layout.full(len(q.loops))[axis] + q.ndim
    q = (
      _without_loop(q, axis, loop) if loop < len(q.loops) else q.squeeze([axis])
    )
  return q


def _without_loop(q, axis, loop):
  loops, full = len(q.loops), list(q.layout.full(len(q.loops)))
  del full[axis]
  # Counted from the end, only what stands before the dropped axis moves.
  full = [a + 1 if a + q.ndim < loop else a for a in full]
  layout = Layout.make(q.layout.k_shape, q.layout.n_shape, full, loops - 1)
  q = jax.tree.map(lambda c: jnp.squeeze(c, loop), q)
  return dataclasses.replace(q, layout=layout)


def _broadcast(eqn, vals):
  where = eqn.params['broadcast_dimensions']
  new = eqn.params['shape']
  added = [i for i in range(len(new)) if i not in where]
  if any(new[i] != 1 for i in added) or any(
    new[w] != n for w, n in zip(where, vals[0].shape, strict=True)
  ):
    raise LayoutError('a broadcast')
  return vals[0].expand_dims(tuple(added))


def _split(eqn, vals):
  q, axis = vals[0], eqn.params['axis']
  parts, start = [], 0
  for size in eqn.params['sizes']:
    starts, limits = [0] * q.ndim, list(q.shape)
    starts[axis], limits[axis] = start, start + size
    parts.append(q.slice(starts, limits))
    start += size
  return parts


def _concatenate(eqn, vals):
  if not all(isinstance(v, QTensor) for v in vals):
    raise LayoutError('joined with a value that is not quantized')
  return core.concatenate(vals, eqn.params['dimension'])


def _convert(eqn, vals):
  dtype = eqn.params['new_dtype']
  if not jnp.issubdtype(dtype, jnp.floating):
    raise LayoutError(f'a cast to {dtype}')
  return vals[0].astype(dtype)


def _same(eqn, vals):
  return list(vals) if len(eqn.outvars) > 1 else vals[0]


_RULES: dict[str, Callable[[Any, Sequence[Any]], Any]] = {
  'transpose': lambda e, v: v[0].transpose(e.params['permutation']),
  'reshape': lambda e, v: v[0].reshape(e.params['new_sizes']),
  'squeeze': _squeeze,
  'expand_dims': lambda e, v: v[0].expand_dims(e.params['dimensions']),
  'broadcast_in_dim': _broadcast,
  'convert_element_type': _convert,
  'slice': _slice,
  'dynamic_slice': _dynamic_slice,
  'split': _split,
  'concatenate': _concatenate,
  # A constraint on the dense array says nothing of its codes.
  'sharding_constraint': _same,
  'device_put': _same,
  'optimization_barrier': _same,
  'copy': _same,
  'copy_p': _same,
  'name': _same,
  'stop_gradient': _same,
}


def follow(eqn: Any, vals: Sequence[Any]) -> list[Any] | None:
  """The operation done by changing metadata; None if there is no rule.

  Raises:
    LayoutError: it cannot be done so here.
  """
  rule = _RULES.get(eqn.primitive.name)
  others = [v for v in vals if not isinstance(v, QTensor)]
  if rule is None or (not isinstance(vals[0], QTensor) and rule is not _same):
    return None
  if rule is _same and others and len(eqn.outvars) == 1:
    return None
  found = rule(eqn, vals)
  return found if isinstance(found, list) else [found]


def loops_first(q: QTensor) -> bool:
  """Whether the leading logical axis is a loop axis, so that scan slices it."""
  return bool(q.loops) and q.layout.full(len(q.loops))[0] == -q.ndim


def alike(a: Any, b: Any) -> bool:
  """Whether two quantized values have the same structure and shapes."""
  (a_leaves, a_tree), (b_leaves, b_tree) = map(jax.tree.flatten, (a, b))
  if a_tree != b_tree:  # type: ignore[operator]
    return False
  pairs = zip(a_leaves, b_leaves, strict=True)
  return all(x.shape == y.shape and x.dtype == y.dtype for x, y in pairs)
