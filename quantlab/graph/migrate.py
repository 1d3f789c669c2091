"""Moves a scale, a shift or a rotation across a pair.

With t the tensor between producers and consumers, t' = (t - z) / s; the
function's output stays as it was (the migration table of arXiv 2304.09145,
2405.16406). Parameters are a flat dict by path; a new dict is returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from quantlab.graph.pairs import Member, Pair

Params = Mapping[str, Any]


def scale_pair(params: Params, pair: Pair, s: Any) -> dict[str, Any]:
  """Divides the producers by s and multiplies the consumers by it.

  Args:
    params: arrays by path.
    pair: where.
    s: positive scale, shape `pair.shape`.
  """
  s = _checked(pair, 'scale', s, pair.shape).reshape(-1)
  new = dict(params)
  for member in pair.producers:
    w = new[member.path]
    scaled = (w + member.offset) / _spread(member, s, w, 1) - member.offset
    new[member.path] = scaled.astype(w.dtype)
  for member in pair.consumers:
    w = new[member.path]
    new[member.path] = (w * _spread(member, s, w, 1)).astype(w.dtype)
  return new


def shift_pair(params: Params, pair: Pair, z: Any) -> dict[str, Any]:
  """Takes z off the producers' bias and adds W z to the consumers' biases.

  Args:
    params: arrays by path.
    pair: where.
    z: shift, shape `pair.shape`.
  """
  z = _checked(pair, 'shift', z, pair.shape).reshape(-1)
  new = dict(params)
  for member in pair.consumers:
    if member.bias is None:
      continue
    path, outputs, kernel = member.bias
    w, bias = new[member.path], new[path]
    product = w * _spread(member, z, w, 0)
    summed = tuple(a for a, n in enumerate(kernel.shape) if n == 1)
    total = jnp.sum(product, summed, keepdims=True).reshape(-1)
    by_output = jnp.zeros(total.shape, total.dtype)
    by_output = by_output.at[kernel.reshape(-1)].set(total)
    new[path] = (bias + by_output[outputs]).astype(bias.dtype)
  for member in pair.producers:
    if member.path == pair.shifted:
      b = new[member.path]
      new[member.path] = (b - _spread(member, z, b, 0)).astype(b.dtype)
  return new


def rotate_pair(params: Params, pair: Pair, r: Any) -> dict[str, Any]:
  """Rotates each run of channels: t' = t r, undone in the consumers.

  Args:
    params: arrays by path.
    pair: where.
    r: orthogonal matrices, shape (*pair.loops, d, d) for all heads alike, with
      d = channels / heads.
  """
  d = pair.channels // pair.heads
  r = _checked(pair, 'rotate', r, (*pair.loops, d, d)).reshape(-1, d, d)
  new = dict(params)
  for member in (*pair.producers, *pair.consumers):
    new[member.path] = _rotated(pair, member, new[member.path], r)
  return new


def _checked(pair, what, value, shape) -> jax.Array:
  if what not in pair.allows:
    raise ValueError(
      f"pair '{pair.source}' ({pair.kind}) allows "
      f'{sorted(pair.allows) or "nothing"}, not {what!r}'
      + (': its channels also enter a residual sum' if pair.residual else '')
    )
  if jnp.shape(value) != tuple(shape):
    raise ValueError(
      f"pair '{pair.source}' needs a {what} of shape {tuple(shape)}; got "
      f'{jnp.shape(value)}'
    )
  return jnp.asarray(value)


def _spread(member: Member, s: jax.Array, w: Any, neutral: float) -> jax.Array:
  """The value for each element of a parameter; `neutral` where none."""
  s = s.astype(jnp.promote_types(s.dtype, w.dtype))
  found = s[np.maximum(member.index, 0)]
  return jnp.where(member.index < 0, jnp.asarray(neutral, s.dtype), found)


def _rotated(pair, member, w, r):
  """Rotates the runs of one parameter; both sides by the same matrix."""
  axes = member.axes
  order = (*(a for a in range(w.ndim) if a not in axes), *axes)
  y = jnp.transpose(w, order)
  rest = y.shape[: w.ndim - len(axes)]
  d = r.shape[-1]
  index = member.index.transpose(order).reshape(-1)
  rows = index.reshape(-1, d)[:, 0]
  layer = np.maximum(rows, 0) // pair.channels
  turned = jnp.einsum(
    '...hd,hde->...he',
    y.reshape(*rest, -1, d),
    r[layer],
    precision=lax.Precision.HIGHEST,
  )
  kept = jnp.where((rows < 0)[:, None], y.reshape(*rest, -1, d), turned)
  back = jnp.transpose(kept.reshape(y.shape), tuple(np.argsort(order)))
  return back.astype(w.dtype)
