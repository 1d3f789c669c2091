"""GPTQ (arXiv 2210.17323) on any format of the core."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    ValueError: a Hessian that is not finite, or cannot be factored at any
      damping tried (site and damping named).
  """
  nearest = rtn()

  def encode(target: Target, stat: Any, key):
    if stat is None:
      return nearest.encode(target, None, key)
    w = target.storage.layout.to_canonical(target.weight)
    _refuse(target, stat)
    hessian = stat['moments'] / stat['rows']
    quantizer = target.storage.quantizer
    qparams = core.fit(w, quantizer, axis=-2)
    grouped, restore = _by_group(target.site, w, qparams)
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
      rounded = restore(out.weight)
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
      'stream: an earlier site overflowed, or a batch holds NaN'
    )


def _by_group(site, w, qparams: QParams):
  """Columns of a grouped convolution beside the inputs of their group."""
  if site is None or not isinstance(site.dims, ConvDims):
    return None, None
  groups, (k, n) = site.dims.groups, w.shape[-2:]
  if groups == 1:
    return None, None

  def split(a):
    a = jnp.broadcast_to(a, (*a.shape[:-1], n))
    return jnp.moveaxis(a.reshape(a.shape[-2], groups, n // groups), 1, 0)

  params = QParams(
    split(qparams.scale),
    None if qparams.zero_point is None else split(qparams.zero_point),
    None
    if qparams.scale2 is None
    else jnp.broadcast_to(qparams.scale2, (groups, 1, 1)),
    None if qparams.codebook is None else split(qparams.codebook),
  )

  def restore(rounded):
    return jnp.moveaxis(rounded, 0, 1).reshape(k, n)

  return (split(w), params), restore


def _facts(target, stat, k) -> dict[str, Any]:
  """How many rows of inputs were seen, and whether they were enough."""
  rows = int(np.max(jax.device_get(stat['rows'])))
  if rows >= k:
    return {'rows': rows}
  warning = (
    f'{target.name}: {rows} rows of calibration for {k} inputs; the Hessian '
    f'has rank {rows} at most, damping decides the rest. Use '
    f'{math.ceil(k / max(rows, 1))} times the samples'
  )
  return {'rows': rows, 'warning': warning}
