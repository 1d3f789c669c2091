"""Labels forward: what a scale per channel passes, operation by operation.

See `channels`. A rule takes the labels of an operation's operands (None: not
labelled) and gives those of its results; `BrokenError` says that the scale
does not pass. What else there is to know goes to the scene (`channels.Scene`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from quantlab.graph import contract
from quantlab.graph.channels import (
  BrokenError,
  Labels,
  carried,
  expand,
  narrow,
  only,
  reshape,
  same,
)
from quantlab.graph.flat import Op

# Layout -----------------------------------------------------------------------


def _identity(scene, op, labels):
  return labels[: len(op.outs)]


def _negate(scene, op, labels):
  scene.mark('linear', labels[0])
  return labels


def _cast(scene, op, labels):
  kind = np.dtype(op.eqn.params['new_dtype'])
  if not _is_float(kind):
    raise BrokenError
  return labels


def _is_float(dtype: Any) -> bool:
  return np.dtype(dtype).kind in 'fV'  # V: bfloat16 and the small floats


def _transpose(scene, op, labels):
  return [labels[0].transpose(op.eqn.params['permutation'])]


def _reshape(scene, op, labels):
  return [reshape(labels[0], scene.shape(op.ins[0]), scene.shape(op.outs[0]))]


def _insert(scene, op, labels):
  """broadcast_in_dim: old axes go where they are told, new ones are equal."""
  where = op.eqn.params['broadcast_dimensions']
  shape = [1] * len(scene.shape(op.outs[0]))
  for axis, n in zip(where, labels[0].shape, strict=True):
    shape[axis] = n
  order = np.argsort(where) if len(where) else ()
  return [labels[0].transpose(order).reshape(shape)]


def _slices(op, sizes):
  p = op.eqn.params
  strides = p['strides'] or (1,) * len(sizes)
  return zip(p['start_indices'], p['limit_indices'], strides, strict=True)


def _slice(scene, op, labels):
  label = labels[0]
  index = tuple(
    slice(a, b, s) if n > 1 else slice(None)
    for n, (a, b, s) in zip(label.shape, _slices(op, label.shape), strict=True)
  )
  return [label[index]]


def _split(scene, op, labels):
  axis, sizes = op.eqn.params['axis'], op.eqn.params['sizes']
  if labels[0].shape[axis] == 1:
    return [labels[0]] * len(sizes)
  return np.split(labels[0], np.cumsum(sizes)[:-1], axis)


def _unstack(scene, op, labels):
  axis, label = op.eqn.params['axis'], labels[0]
  if label.shape[axis] == 1:
    return [label.squeeze(axis)] * len(op.outs)
  return [label.take(i, axis) for i in range(len(op.outs))]


def _tile(scene, op, labels):
  reps = op.eqn.params['reps']
  return [
    np.tile(
      labels[0],
      [r if n > 1 else 1 for r, n in zip(reps, labels[0].shape, strict=True)],
    )
  ]


def _dynamic_slice(scene, op, labels):
  i, label = only(labels)
  sizes = op.eqn.params['slice_sizes']
  if i or any(
    n not in (1, size) for n, size in zip(label.shape, sizes, strict=True)
  ):
    raise BrokenError
  return [label]


def _gather(scene, op, labels):
  """Whole slices along the carried axes."""
  i, label = only(labels)
  d, sizes = op.eqn.params['dimension_numbers'], op.eqn.params['slice_sizes']
  gone = (*d.collapsed_slice_dims, *d.operand_batching_dims)
  shape = scene.shape(op.ins[0])
  if i or any(a in gone or sizes[a] != shape[a] for a in carried(label)):
    raise BrokenError
  kept = [a for a in range(len(shape)) if a not in gone]
  out = [1] * len(scene.shape(op.outs[0]))
  for axis, place in zip(kept, d.offset_dims, strict=True):
    out[place] = label.shape[axis]
  return [label.reshape(out)]


def _rev(scene, op, labels):
  return [np.flip(labels[0], op.eqn.params['dimensions'])]


def _pad(scene, op, labels):
  i, label = only(labels)
  config = op.eqn.params['padding_config']
  shape = scene.shape(op.ins[0])
  if i:
    raise BrokenError
  for axis, (low, high, interior) in enumerate(config):
    if not (low or high or interior):
      continue
    if label.shape[axis] == 1:
      if not scene.zero(op.ins[1]):
        raise BrokenError
      scene.mark('linear', label)
      continue
    if interior or low < 0 or high < 0:
      raise BrokenError
    widths = [(0, 0)] * len(shape)
    widths[axis] = (int(low), int(high))
    label = np.pad(label, widths, constant_values=-1)
  return [label]


def _concatenate(scene, op, labels):
  axis = op.eqn.params['dimension']
  known = [x for x in labels if x is not None]
  if all(x.shape[axis] == 1 and same(x, known[0]) for x in known):
    others = [k for k, x in enumerate(labels) if x is None]
    if all(scene.fixed(op.ins[k]) for k in others):
      for k in others:  # a class token before the patches
        if not scene.zero(op.ins[k]):
          scene.join(op, k, known[0])
      return [known[0]]
  return [_joined(labels, axis, [scene.shape(a)[axis] for a in op.ins])]


def _joined(labels, axis, sizes):
  """Labels one after another along an axis; -1 where there is none."""
  ndim = max(x.ndim for x in labels if x is not None)
  parts = [np.full([1] * ndim, -1) if x is None else x for x in labels]
  parts = [np.moveaxis(x, axis, 0) for x in parts]
  wide = np.broadcast_shapes(*(x.shape[1:] for x in parts))
  full = [
    np.broadcast_to(x, (n, *wide)) for n, x in zip(sizes, parts, strict=True)
  ]
  return np.moveaxis(np.concatenate(full), 0, axis)


def _stack(scene, op, labels):
  axis = op.eqn.params['axis']
  wide = [None if x is None else np.expand_dims(x, axis) for x in labels]
  return [narrow(_joined(wide, axis, [1] * len(wide)))]


# Arithmetic -------------------------------------------------------------------


def _scale(scene, op, labels):
  """A product, or a quotient with the labelled value above."""
  i, label = only(labels)
  if op.name == 'div' and i:
    raise BrokenError
  other = op.ins[1 - i]
  shape = scene.shape(other)
  label = expand(label, len(scene.shape(op.outs[0])))
  varies = len(shape) == label.ndim and any(
    shape[a] > 1 for a in carried(label)
  )
  if not varies:
    scene.mark('linear', label)
  else:
    scene.mark('gain' if scene.fixed(other) else 'times', label)
  return [label]


def _sum(scene, op, labels):
  ndim = len(scene.shape(op.outs[0]))
  a, b = (None if x is None else expand(x, ndim) for x in labels)
  if a is not None and b is not None:
    if not same(a, b):
      raise BrokenError
    return [a]
  i, label = only([a, b])
  other = op.ins[1 - i]
  if op.name == 'sub' and i:
    scene.mark('linear', label)  # a shift changes its sign
  if scene.zero(other):
    return [label]
  if not scene.fixed(other):
    raise BrokenError(residual=not scene.fixed(op.ins[i]))
  if not isinstance(other, int):
    scene.offset(op, i, float(other.val))
  else:
    scene.join(op, 1 - i, label)
  return [label]


def _extreme(scene, op, labels):
  """Max or min with zero (ReLU) or with a value of the same label."""
  ndim = len(scene.shape(op.outs[0]))
  labels = [None if x is None else expand(x, ndim) for x in labels]
  return _agree(scene, op.ins, labels)


def _agree(scene, atoms, labels):
  """One of several values: all labelled alike, or zero."""
  found = [x for x in labels if x is not None]
  for atom, label in zip(atoms, labels, strict=True):
    if label is None and not scene.zero(atom):
      raise BrokenError
  if not all(same(x, found[0]) for x in found):
    raise BrokenError
  scene.mark('sign', found[0])
  return [found[0]]


def _compare(scene, op, labels):
  """Which side of zero: not changed by a positive scale."""
  _extreme(scene, op, labels)
  return [None]


def _select(scene, op, labels):
  if labels[0] is not None:
    raise BrokenError
  return _agree(scene, op.ins[1:], labels[1:])


def _absolute(scene, op, labels):
  scene.mark('sign', labels[0])
  return [labels[0]]


def _reduce(scene, op, labels):
  axes, label = op.eqn.params['axes'], labels[0]
  if any(label.shape[a] > 1 for a in axes):
    raise BrokenError
  scene.mark('linear' if op.name == 'reduce_sum' else 'sign', label)
  return [label.squeeze(tuple(axes))]


def _window(scene, op, labels):
  label, p = labels[0], op.eqn.params
  if any(
    p['window_dimensions'][a] != 1 or tuple(p['padding'][a]) != (0, 0)
    for a in carried(label)
  ):
    raise BrokenError
  scene.mark('linear' if op.name == 'reduce_window_sum' else 'sign', label)
  return [label]


RULES: dict[str, Callable[[Any, Op, Labels], Labels]] = {
  **dict.fromkeys(
    (
      'copy',
      'copy_p',
      'stop_gradient',
      'optimization_barrier',
      'sharding_constraint',
      'constrain',
      'reduce_precision',
    ),
    _identity,
  ),
  'neg': _negate,
  'convert_element_type': _cast,
  'transpose': _transpose,
  **dict.fromkeys(('reshape', 'squeeze', 'expand_dims'), _reshape),
  'broadcast_in_dim': _insert,
  'slice': _slice,
  'split': _split,
  'dynamic_slice': _dynamic_slice,
  'gather': _gather,
  'rev': _rev,
  'pad': _pad,
  'concatenate': _concatenate,
  'stack': _stack,
  'unstack': _unstack,
  'tile': _tile,
  **dict.fromkeys(('mul', 'div'), _scale),
  **dict.fromkeys(('add', 'sub', 'add_any'), _sum),
  **dict.fromkeys(('max', 'min'), _extreme),
  **dict.fromkeys(('gt', 'ge', 'lt', 'le', 'eq', 'ne'), _compare),
  'select_n': _select,
  'abs': _absolute,
  **dict.fromkeys(('reduce_sum', 'reduce_max', 'reduce_min'), _reduce),
  **dict.fromkeys(
    ('reduce_window_sum', 'reduce_window_max', 'reduce_window_min'), _window
  ),
  'dot_general': contract.dot,
  'conv_general_dilated': contract.conv,
  'ragged_dot_general': contract.ragged,
}
