"""Roles of the axes of a traced contraction: batch, free, contracted."""

from __future__ import annotations

import math
from typing import Any

from quantlab.graph import views
from quantlab.ops import dims as dims_lib

# Traced products by primitive.
KINDS = {
  'dot_general': 'dot',
  'conv_general_dilated': 'conv',
  'ragged_dot_general': 'ragged_dot',
}


def of(
  eqn: Any, kind: str, side: str | None, view: views.View | None
) -> tuple[dims_lib.Dims | None, str | None]:
  """(axis roles, reason of refusal) of a contraction.

  Args:
    eqn: the traced product.
    kind: see `Site`.
    side: which operand is the weight.
    view: what is known of the weight; its axes go in storage order.
  """
  if kind == 'dot':
    return _dot(eqn.params['dimension_numbers'], eqn, side, view), None
  if kind == 'conv':
    return _conv(eqn.params, side)
  if kind == 'gather':
    return _gather(eqn, view), None
  return _ragged(eqn, side)


def _conv(p, side):
  if side == 'lhs' or side is None or p['batch_group_count'] != 1:
    return None, 'only a convolution whose kernel is the right operand'
  d = p['dimension_numbers']
  window = (
    p['window_strides'],
    p['padding'],
    p['lhs_dilation'],
    p['rhs_dilation'],
  )
  found = dims_lib.ConvDims(
    tuple(d.lhs_spec),
    tuple(d.rhs_spec),
    tuple(d.out_spec),
    p['feature_group_count'],
    window,
  )
  return found, None


def _gather(eqn, view):
  numbers = eqn.params['dimension_numbers']
  [row] = numbers.collapsed_slice_dims
  rest = [i for i in range(len(eqn.invars[0].aval.shape)) if i != row]
  if view is not None and view.joined is None:
    rest = list(views.order(view, rest))
  mode = str(eqn.params['mode']).split('.')[-1].lower()
  return dims_lib.GatherDims(row, tuple(rest), tuple(numbers.offset_dims), mode)


def _dot(numbers, eqn, side, view):
  (lc, rc), (lb, rb) = numbers
  free = [
    [i for i in range(len(v.aval.shape)) if i not in (*c, *b)]
    for v, c, b in ((eqn.invars[0], lc, lb), (eqn.invars[1], rc, rb))
  ]
  if side == 'lhs':
    x, w = (rb, free[1], rc), (lb, free[0], lc)
  else:
    x, w = (lb, free[0], lc), (rb, free[1], rc)
  w_contract, w_free = tuple(w[2]), tuple(w[1])
  if view is not None and view.joined is None:
    w_contract = views.order(view, w_contract)
    w_free = views.order(view, w_free)
  position = {axis: k for k, axis in enumerate(w[2])}
  x_contract = tuple(x[2][position[axis]] for axis in w_contract)
  return dims_lib.DotDims(
    tuple(x[0]),
    tuple(x[1]),
    x_contract,
    tuple(w[0]),
    w_free,
    w_contract,
    weight_first=side == 'lhs',
  )


def _ragged(eqn, side):
  numbers = eqn.params['ragged_dot_dimension_numbers']
  (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
  group = tuple(numbers.rhs_group_dimensions)
  if side != 'rhs' or lb or rb or len(group) != 1:
    return None, 'only a ragged product whose right operand is the weight'
  ndim = len(eqn.invars[1].aval.shape)
  free = tuple(i for i in range(ndim) if i not in (*rc, *group))
  rows = range(len(eqn.invars[0].aval.shape))
  x_free = tuple(i for i in rows if i not in lc)
  return dims_lib.RaggedDims(group, free, tuple(rc), tuple(lc), x_free), None


def separable(view: views.View, dims: dims_lib.Dims) -> bool:
  """Whether each parameter axis lies wholly in one role."""
  if view.joined is not None and view.joined not in dims.w_free:
    return False
  for part in range(len(view.leaves)):
    batch, contract, free = (
      set(view.axes(which, part))
      for which in (dims.w_batch, dims.w_contract, dims.w_free)
    )
    if batch & contract or batch & free or contract & free:
      return False
  return True


def lookup_rows(eqn: Any) -> int | None:
  """The axis along which a gather looks up whole rows; None if it does not."""
  d = eqn.params['dimension_numbers']
  shape = eqn.invars[0].aval.shape
  sizes = tuple(eqn.params['slice_sizes'])
  rows = tuple(d.collapsed_slice_dims)
  plain = (
    len(rows) == 1
    and len(shape) >= 2
    and tuple(d.start_index_map) == rows
    and not d.operand_batching_dims
    and all(
      s == n
      for i, (s, n) in enumerate(zip(sizes, shape, strict=True))
      if i not in rows
    )
  )
  return rows[0] if plain else None


def channel_axis(
  dims: dims_lib.Dims | None, out: tuple[int, ...]
) -> int | None:
  """Axis of the result that runs over the weight's one output axis, or None."""
  if dims is None or len(dims.w_free) != 1:
    return None
  if isinstance(dims, dims_lib.ConvDims):
    return dims.out_spec[1]
  if isinstance(dims, dims_lib.DotDims):
    return len(dims.w_batch) if dims.weight_first else len(out) - 1
  return None


def macs(kind: str, dims: dims_lib.Dims | None, shapes: Any, side: Any) -> int:
  """Multiply-accumulates of one product with operand and result `shapes`."""
  if kind == 'gather' or dims is None:
    return 0
  if isinstance(dims, dims_lib.RaggedDims):
    return math.prod(shapes[2]) * math.prod(
      shapes[0][i] for i in dims.x_contract
    )
  weight = shapes[0] if side == 'lhs' else shapes[1]
  return math.prod(shapes[2]) * math.prod(weight[i] for i in dims.w_contract)
