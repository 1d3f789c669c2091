"""Labels at products: where channels are contracted, and where they pass.

See `channels` and `forward`. A product with a weight that contracts the
channels takes the scale in; a weight's own outputs become the channels of the
result; a product of two activations hands on channels it does not contract.
"""

from __future__ import annotations

import math

import numpy as np

from quantlab.graph.channels import BrokenError, carried, narrow, only


def dot(scene, op, labels):
  i, label = only(labels)
  contract, batch = op.eqn.params['dimension_numbers']
  mine, other = contract[i], contract[1 - i]
  ndim = [len(scene.shape(a)) for a in op.ins[:2]]
  free = [a for a in range(ndim[i]) if a not in mine and a not in batch[i]]
  weight = op.ins[1 - i]
  if any(label.shape[a] > 1 for a in mine):
    if any(label.shape[a] > 1 for a in free) or not scene.fixed(weight):
      raise BrokenError
    shape = [1] * ndim[1 - i]
    for a, b in zip((*mine, *batch[i]), (*other, *batch[1 - i]), strict=True):
      shape[b] = label.shape[a]
    pairs = sorted(
      zip((*other, *batch[1 - i]), (*mine, *batch[i]), strict=True)
    )
    order = [a for _, a in pairs]
    rest = [a for a in free if a not in order]
    _keep_apart(scene, label, batch[i])
    scene.absorb(op, 1 - i, label.transpose([*order, *rest]).reshape(shape))
    return [None]
  if scene.fixed(op.ins[i]):
    _keep_apart(scene, label, batch[i])
  elif scene.fixed(weight):
    scene.mark('linear', label)
  elif not mine:  # elementwise, in all but name
    varies = set(carried(label)) & set(batch[i])
    scene.mark('times' if varies else 'linear', label)
  else:
    # A weighted mean of shifted values is the shifted mean.
    mean = len(other) == 1 and scene.averages(weight, other[0])
    scene.mark('dot', label, _runs(label, batch[i]), shifts=mean)
  n_other = ndim[1 - i] - len(mine) - len(batch[i])
  out = label.transpose([*batch[i], *free, *mine])
  sizes = list(out.shape[: len(batch[i]) + len(free)])
  at = len(batch[i]) if i else len(sizes)
  sizes[at:at] = [1] * n_other
  return [out.reshape(sizes)]


def _runs(label, batch):
  """The channels at each place of some axes."""
  rest = [a for a in range(label.ndim) if a not in batch]
  lead = math.prod(label.shape[a] for a in batch)
  return label.transpose([*batch, *rest]).reshape(lead, -1)


def _keep_apart(scene, label, batch):
  """Batch axes of a weight keep their channels apart."""
  if set(carried(label)) & set(batch):
    scene.mark('split', label, _runs(label, batch), shifts=True)


def conv(scene, op, labels):
  i, label = only(labels)
  p = op.eqn.params
  d, groups = p['dimension_numbers'], p['feature_group_count']
  axis = d.rhs_spec[0] if i else d.lhs_spec[1]
  if p['batch_group_count'] != 1 or set(carried(label)) - {axis}:
    raise BrokenError
  if groups > 1 and label.size > 1:
    runs = label.reshape(groups, -1)
    scene.mark('split', label, runs, shifts=True)
  if i:  # the kernel itself: its output channels
    shape = [1] * label.ndim
    shape[d.out_spec[1]] = label.size
    return [label.reshape(shape)]
  if not scene.fixed(op.ins[1]):
    raise BrokenError
  kernel = scene.shape(op.ins[1])
  n_in, n_out = kernel[d.rhs_spec[1]], kernel[d.rhs_spec[0]]
  flat = np.broadcast_to(label.reshape(-1), (groups * n_in,))
  group = np.arange(n_out) // (n_out // groups)
  index = flat[group[None, :] * n_in + np.arange(n_in)[:, None]]
  if d.rhs_spec[1] > d.rhs_spec[0]:
    index = index.T
  shape = [1] * len(kernel)
  shape[d.rhs_spec[1]], shape[d.rhs_spec[0]] = n_in, n_out
  if any(lo or hi for lo, hi in p['padding']):
    scene.mark('linear', label)  # zeros beyond the edge are not shifted
  scene.absorb(op, 1, narrow(index.reshape(shape)))
  return [None]


def ragged(scene, op, labels):
  i, label = only(labels)
  numbers = op.eqn.params['ragged_dot_dimension_numbers']
  (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
  group = tuple(numbers.rhs_group_dimensions)
  ndim = len(scene.shape(op.ins[1]))
  free = [a for a in range(ndim) if a not in (*rc, *group)]
  if i > 1 or lb or rb or len(rc) != 1 or len(free) != 1:
    raise BrokenError
  axis = free[0] if i else lc[0]
  if set(carried(label)) - {axis}:
    raise BrokenError
  if i:
    return [label.reshape(1, -1)]
  if not scene.fixed(op.ins[1]):
    raise BrokenError
  shape = [1] * ndim
  shape[rc[0]] = label.size
  scene.absorb(op, 1, label.reshape(shape))
  return [None]
