"""GPTQ (arXiv 2210.17323) on any format of the core."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from quantlab import core
from quantlab.core import QParams
from quantlab.ops import ConvDims
from quantlab.ptq.hessian import InputMoments
from quantlab.ptq.rtn import rtn
from quantlab.ptq.second_order import second_order
from quantlab.ptq.transform import Encoder, Target


def gptq(
  *, damp: float = 0.01, act_order: bool = True, static_groups: bool = True
) -> Encoder:
  """Rounding with second-order compensation, block by block.

  Inputs are those of the quantized stream: what the weight will really see.
  Embedding lookups have no inputs and are rounded to nearest.

  Args:
    damp: added to the Hessian's diagonal, as a share of its mean.
    act_order: round inputs of large second moment first.
    static_groups: scales of groups from the original weights; False finds
      them on the way (then `act_order` must be False).

  Raises:
    ValueError: an argument out of range; a Hessian that is not finite, or
      cannot be factored at any damping tried (site and damping named).
  """
  if not damp > 0:
    raise ValueError(f'damp is a positive share of the diagonal, got {damp}')
  if act_order and not static_groups:
    raise ValueError(
      'gptq(static_groups=False) needs act_order=False: in another order a '
      'group has no first row'
    )
  nearest = rtn()

  def encode(target: Target, stat: Any, key):
    if stat is None:
      codes, facts = nearest.encode(target, None, key)
      why = 'rounded to nearest: a lookup, or a parameter of several uses'
      return codes, {**facts, 'note': why}
    w = target.storage.layout.to_canonical(target.weight)
    _refuse(target, stat)
    rows = jnp.maximum(stat['rows'], 1)[..., None, None]
    hessian = stat['moments'] / rows
    quantizer = target.storage.quantizer
    qparams = core.fit(w, quantizer, axis=-2)
    grouped, merge = _by_group(target.site, w, qparams)
    run = functools.partial(
      second_order,
      damp=damp,
      act_order=act_order,
      static_groups=static_groups,
    )
    if grouped is None:
      out = run(w, hessian, quantizer, qparams)
      rounded, qparams = out.weight, out.qparams
    else:
      out = run(grouped[0], hessian, quantizer, grouped[1])
      rounded = merge(out.weight)
      if not static_groups and quantizer.group is not None:
        qparams = jax.tree.map(merge, out.qparams)  # found on the way
    if not np.isfinite(np.asarray(out.damp)).all():
      raise ValueError(
        f'the Hessian of the inputs of {target.name!r} cannot be factored '
        f'with damping up to {damp * 1e6:g} of its mean diagonal; raise damp='
      )
    logical = target.storage.layout.to_logical(rounded)
    codes = core.quantize(
      logical.astype(jnp.float32), quantizer, target.storage.layout, qparams
    ).astype(target.weight.dtype)
    return codes, _facts(target, stat, hessian.shape[-1])

  options = {
    'damp': damp,
    'act_order': act_order,
    'static_groups': static_groups,
  }
  return Encoder('gptq', encode, InputMoments, options)


def _refuse(target, stat):
  if not bool(jnp.isfinite(stat['moments']).all()):
    raise ValueError(
      f'the inputs of {target.name!r} are not finite in the quantized '
      'stream: an earlier site overflowed, or a batch, or a parameter that '
      'stays in float, holds NaN'
    )


def _by_group(site, w, qparams: QParams):
  """Columns of a grouped convolution beside the inputs of their group."""
  if site is None or not isinstance(site.dims, ConvDims):
    return None, None
  groups, n = site.dims.groups, w.shape[-1]
  if groups == 1:
    return None, None

  def split(a):
    a = jnp.repeat(a, n // a.shape[-1], axis=-1)  # of the tensor, of a block
    return jnp.moveaxis(a.reshape(a.shape[-2], groups, n // groups), 1, 0)

  params = QParams(
    split(qparams.scale),
    None if qparams.zero_point is None else split(qparams.zero_point),
    None
    if qparams.scale2 is None
    else jnp.broadcast_to(qparams.scale2, (groups, 1, 1)),
    None if qparams.codebook is None else split(qparams.codebook),
  )

  def merge(a):
    return jnp.moveaxis(a, 0, 1).reshape(a.shape[1], n)

  return (split(w), params), merge


def _facts(target, stat, k) -> dict[str, Any]:
  """How many rows of inputs were seen, and whether they were enough."""
  counts = np.asarray(jax.device_get(stat['rows']), int)
  rows = int(counts.min())
  if rows >= k:
    return {'rows': rows}
  at = f' (entry {int(counts.argmin())} of {counts.size})' * (counts.size > 1)
  warning = (
    f'{target.name}{at}: {rows} rows of calibration for {k} inputs; the '
    f'Hessian has rank {rows} at most, damping decides the rest. Use '
    f'{math.ceil(k / max(rows, 1))} times the samples'
  )
  logging.warning(warning)
  return {'rows': rows, 'warning': warning}
