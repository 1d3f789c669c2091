"""Labels backward: from a value to what it is a rearrangement of.

See `channels`. A consumer's weight or a bias is known by its label where it is
used; these rules find the label of the parameter it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from quantlab.graph import channels
from quantlab.graph.channels import BrokenError, Label
from quantlab.graph.flat import Op
from quantlab.graph.forward import RULES

# Elements that a use does not touch (-1: it touches them and has no channel).
OUTSIDE = -2

Sources = list[tuple[int, Label]]  # (operand, its label)


def _identity(scene, op, out, label) -> Sources:
  return [(out, label)]


def _transpose(scene, op, out, label) -> Sources:
  return [(0, label.transpose(np.argsort(op.eqn.params['permutation'])))]


def _reshape(scene, op, out, label) -> Sources:
  old, new = scene.shape(op.ins[0]), scene.shape(op.outs[0])
  return [(0, channels.reshape(label, new, old))]


def _insert(scene, op, out, label) -> Sources:
  where = tuple(op.eqn.params['broadcast_dimensions'])
  old = scene.shape(op.ins[0])
  for axis in channels.carried(label):
    if axis not in where or old[where.index(axis)] == 1:
      raise BrokenError
  rest = [a for a in range(label.ndim) if a not in where]
  shape = [label.shape[a] for a in where]
  return [(0, label.transpose([*where, *rest]).reshape(shape))]


def _placed(label, axis, size, start, stop, stride=1) -> Label:
  """The label of the whole of which it covers a part of one axis."""
  if (start, stop, stride) == (0, size, 1):
    return label
  shape = list(label.shape)
  shape[axis] = size
  whole = np.full(shape, OUTSIDE)
  index = [slice(None)] * label.ndim
  index[axis] = slice(start, stop, stride)
  whole[tuple(index)] = label
  return whole


def _slice(scene, op, out, label) -> Sources:
  p, sizes = op.eqn.params, scene.shape(op.ins[0])
  strides = p['strides'] or (1,) * len(sizes)
  for axis, size in enumerate(sizes):
    label = _placed(
      label,
      axis,
      size,
      p['start_indices'][axis],
      p['limit_indices'][axis],
      strides[axis],
    )
  return [(0, label)]


def _split(scene, op, out, label) -> Sources:
  axis, sizes = op.eqn.params['axis'], op.eqn.params['sizes']
  start = int(sum(sizes[:out]))
  whole = scene.shape(op.ins[0])[axis]
  return [(0, _placed(label, axis, whole, start, start + int(sizes[out])))]


def _concatenate(scene, op, out, label) -> Sources:
  axis = op.eqn.params['dimension']
  found, start = [], 0
  for k, atom in enumerate(op.ins):
    stop = start + scene.shape(atom)[axis]
    part = label
    if label.shape[axis] > 1:
      part = np.take(label, range(start, stop), axis)
    found.append((k, part))
    start = stop
  return found


def _stack(scene, op, out, label) -> Sources:
  axis = op.eqn.params['axis']
  wide = label.shape[axis] > 1
  return [(k, label.take(k * wide, axis)) for k in range(len(op.ins))]


def _unstack(scene, op, out, label) -> Sources:
  axis = op.eqn.params['axis']
  wide = np.expand_dims(label, axis)
  return [(0, _placed(wide, axis, len(op.outs), out, out + 1))]


def _tile(scene, op, out, label) -> Sources:
  """Every repetition must have the same label."""
  sizes = scene.shape(op.ins[0])
  index = tuple(
    slice(0, size) if n > 1 else slice(None)
    for n, size in zip(label.shape, sizes, strict=True)
  )
  part = label[index]
  [again] = RULES['tile'](scene, op, [part])
  if not channels.same(again, label):
    raise BrokenError
  return [(0, part)]


def _cast(scene, op, out, label) -> Sources:
  RULES['convert_element_type'](scene, op, [label])
  return [(0, label)]


def _scale(scene, op, out, label) -> Sources:
  """Of a product the larger factor; of a quotient what stands above."""
  shapes = [scene.shape(a) for a in op.ins]
  k = 0
  if op.name == 'mul':
    k = int(np.prod(shapes[1]) > np.prod(shapes[0]))
  return [(k, _fitting(label, shapes[k]))]


def _sum(scene, op, out, label) -> Sources:
  return [
    (k, _fitting(label, scene.shape(a)))
    for k, a in enumerate(op.ins)
    if not scene.zero(a)
  ]


def _fitting(label: Label, shape: Sequence[int]) -> Label:
  if len(shape) != label.ndim or any(
    shape[a] == 1 for a in channels.carried(label)
  ):
    raise BrokenError
  return label


# A shift or a rotation does not come back through these as it is.
ARITHMETIC = ('neg', 'mul', 'div', 'add', 'sub', 'add_any')

BACK: dict[str, Callable[[channels.Values, Op, int, Label], Sources]] = {
  **dict.fromkeys(
    (
      'copy',
      'copy_p',
      'stop_gradient',
      'optimization_barrier',
      'neg',
      'sharding_constraint',
      'constrain',
      'reduce_precision',
    ),
    _identity,
  ),
  'convert_element_type': _cast,
  'transpose': _transpose,
  **dict.fromkeys(('reshape', 'squeeze', 'expand_dims'), _reshape),
  'broadcast_in_dim': _insert,
  'slice': _slice,
  'split': _split,
  'concatenate': _concatenate,
  'stack': _stack,
  'unstack': _unstack,
  'tile': _tile,
  **dict.fromkeys(('mul', 'div'), _scale),
  **dict.fromkeys(('add', 'sub', 'add_any'), _sum),
}
