"""Products with quantized operands, and which way each is computed.

The ways:
  int8         integers of both operands, int32 accumulation; over groups or
               blocks of the contraction a float32 sum of int32 sums. Weights
               may be of a small float format whose values are multiples of
               one unit (see `tables`);
  weight only  codes decoded within a float product;
  simulated    dequantized operands, float product: formats that have no
               integer product, or scales that cannot be taken out of one;
  lookup       rows of an embedding, decoded one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import quantlab_kernels as kernels
from quantlab.core import QParams, QTensor, Quantizer
from quantlab.ops import activation, tables


def route(kind: str, quantizers: Mapping[str, Quantizer]) -> str:
  """How a site with these quantizers is computed."""
  if kind == 'gather':
    return 'lookup'
  weight = quantizers.get('weight', quantizers.get('rhs'))
  given = quantizers.get('input', quantizers.get('lhs'))
  if given is None:
    return 'weight only' if 'weight' in quantizers else 'simulated'
  if weight is None or kind == 'ragged_dot':
    return 'simulated'
  tabled = 'weight' in quantizers and tables.exact(weight.format) is not None
  if not (_integer(weight) or tabled) or not _integer(given):
    return 'simulated'
  if given.group is not None:
    aligned = weight.group == given.group
    return 'int8' if aligned and kind == 'dot' else 'simulated'
  if given.per not in ('tensor', 'token'):
    return 'simulated'
  whole = weight.per in ('channel', 'tensor', 'token')
  return (
    'int8'
    if whole or (kind == 'dot' and 'lhs' not in quantizers)
    else ('simulated')
  )


def _integer(q: Quantizer) -> bool:
  fits = q.format.is_integer and q.format.bits <= 8 and q.format.max <= 127
  # Packed codes without a zero (binary) are no two's complement: they are
  # unpacked to -1 and 1, which takes a scale that leaves the sum.
  return fits and (q.format.has_zero or q.per is not None)


def product(
  site: Any,
  lhs: Any,
  rhs: Any,
  quantizer: Quantizer | None,
  qparams: QParams | None,
  default: Callable,
  *,
  integer: bool = True,
) -> jax.Array:
  """The product of a site with a weight, a QTensor or a dense array.

  Args:
    site: kind, side, dims, out_dtype of the contraction.
    lhs, rhs: operands, in the order of the traced product.
    quantizer: of the activation, or None.
    qparams: calibrated parameters of a static quantizer.
    default: the traced product on dense operands.
    integer: False computes on floats what would be computed on integers. The
      derivatives of both are those of the simulation.
  """
  x, w = (lhs, rhs) if site.side == 'rhs' else (rhs, lhs)
  way = 'float'
  if isinstance(w, QTensor):
    roles = {'weight': w.quantizer}
    roles |= {} if quantizer is None else {'input': quantizer}
    way = route(site.kind, roles)
    if integer and way == 'weight only' and _decodable(site, w):
      return _float_dot(site, x, w)

  def simulated(x, w, qparams):
    if isinstance(w, QTensor):
      w = w.dequantize()
    if quantizer is not None:
      x = activation.fake_quantize_activation(
        x, quantizer, site.dims, 'input', qparams
      )
    return default(x, w) if site.side == 'rhs' else default(w, x)

  if quantizer and integer and way == 'int8' and _aligned(site, w):
    run = _int8_conv if site.kind == 'conv' else _int8_dot
    rows = activation.integer_rows(x, quantizer, site.dims, qparams)
    return _straight_through(
      lambda x, w, rows: run(site, x.shape, rows, w),
      simulated,
      (x, w, qparams),
      rows,
    )
  return simulated(x, w, qparams)


def _straight_through(on_integers, simulated, operands, rows):
  """A product on integers, differentiated as its simulation.

  What the simulation decodes is not kept for the backward pass: it would be
  the whole model in float.
  """
  later = jax.checkpoint(simulated)
  return kernels.differentiated_as(
    lambda operands, rows: on_integers(*operands[:2], rows),
    lambda operands, rows: later(*operands),
    operands,
    rows,
  )


def _aligned(site, w: QTensor) -> bool:
  """Whether the codes lie as this product contracts them.

  Not so where a tied parameter is contracted along other axes than those its
  scales follow; the plan notes it.
  """
  dims = site.dims
  loops = w.ndim - len(w.layout.k_shape) - len(w.layout.n_shape)
  want = [*dims.w_batch, *dims.w_contract, *dims.w_free]
  position = w.layout.full(loops)
  have = sorted(range(w.ndim), key=lambda axis: position[axis])
  return have == want and loops == len(dims.w_batch)


def _int8_dot(site, shape, rows, w):
  dims, q = site.dims, w.quantizer
  found = w.qparams
  zero = found.zero_point
  options = {
    'x_scale': rows.scale,
    'x_zero': rows.zero,
    'out_dtype': jnp.dtype(site.out_dtype),
  }
  zero = None if zero is None else zero.astype(jnp.int32)
  group = q.group if q.block is None else q.block[0]
  packed = q.format.bits < 8 and q.format.has_zero
  table = tables.exact(q.format)
  if table is not None:
    out = kernels.lut_matmul(
      rows.codes,
      w.packed_weight(),
      jnp.asarray(table.entries),
      found.step * np.float32(table.unit),
      bits=q.format.bits,
      group=group,
      **options,
    )
  elif not packed and q.per is not None and q.format.signed:
    out = kernels.int8_matmul(
      rows.codes,
      w.int8_weight(),
      w_scale=found.step,
      w_zero=zero,
      **options,
    )
  else:
    out = kernels.w4a8_matmul(
      rows.codes,
      w.packed_weight(),
      found.step,
      bits=q.format.bits,
      group=group,
      zero_point=zero,
      signed=q.format.signed,
      **options,
    )
  return dims.out_restore(out, shape, w.shape)


def _decodable(site, w: QTensor) -> bool:
  """Whether codes are decoded within the product.

  Not those of a codebook that is stored beside them; nor where the program
  rounds its weights to 16 bits, since kernels decode to float32.
  """
  known = w.codebook is None and w.dtype == jnp.float32
  return site.kind == 'dot' and known and _aligned(site, w)


def _float_dot(site, x, w):
  dims, q, found = site.dims, w.quantizer, w.qparams
  integer = q.format.is_integer and q.format.has_zero
  out = kernels.w4a16_matmul(
    dims.x_matrix(x),
    w.packed,
    found.step,
    bits=q.format.bits,
    group=q.group if q.block is None else q.block[0],
    zero_point=found.zero_point,
    signed=q.format.signed,
    decode=None if integer else q.grid.decode,
    out_dtype=jnp.dtype(site.out_dtype),
    precision=site.precision,
  )
  return dims.out_restore(out, x.shape, w.shape)


def _int8_conv(site, shape, rows, w):
  dims, ndim = site.dims, len(shape)
  found = w.qparams
  table, scale = tables.exact(w.quantizer.format), found.step
  if table is None:
    integers = w.integers()
  else:
    integers = jnp.asarray(table.entries)[w.unpack()]
    scale = scale * np.float32(table.unit)
  kernel = dims.w_restore(integers, w.shape)
  strides, padding, lhs_dilation, rhs_dilation = dims.window
  return kernels.int8_conv(
    dims.x_restore(rows.codes, shape),
    kernel,
    x_scale=_per_image(rows.scale, dims, ndim),
    w_scale=_per_output(scale, dims, ndim),
    x_zero=None if rows.zero is None else _per_image(rows.zero, dims, ndim),
    w_zero=None
    if found.zero_point is None
    else _per_output(found.zero_point.astype(jnp.int32), dims, ndim),
    window_strides=strides,
    padding=padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    dimension_numbers=lax.ConvDimensionNumbers(
      dims.lhs_spec, dims.rhs_spec, dims.out_spec
    ),
    feature_group_count=dims.groups,
    out_dtype=jnp.dtype(site.out_dtype),
  )


def _per_image(p, dims, ndim):
  """(M or 1, 1) parameters as they broadcast against the result."""
  shape = [1] * ndim
  shape[dims.out_spec[0]] = p.shape[-2]
  return p.reshape(shape)


def _per_output(p, dims, ndim):
  """(1, N or 1) parameters as they broadcast against the result."""
  shape = [1] * ndim
  shape[dims.out_spec[1]] = p.shape[-1]
  return p.reshape(shape)


def activation_product(
  site: Any,
  lhs: jax.Array,
  rhs: jax.Array,
  rule: Any,
  qparams: Mapping[str, QParams | None],
  default: Callable,
  *,
  integer: bool = True,
) -> jax.Array:
  """A product of two activations with quantized operands."""
  dims = site.dims

  def simulated(lhs, rhs, qparams):
    values = {'lhs': lhs, 'rhs': rhs}
    for role in ('lhs', 'rhs'):
      q = getattr(rule, role)
      if q is not None:
        values[role] = activation.fake_quantize_activation(
          values[role], q, dims, role, qparams.get(role)
        )
    return default(values['lhs'], values['rhs'])

  way = route(site.kind, rule.quantizers)
  if not (integer and way == 'int8' and site.kind == 'dot'):
    return simulated(lhs, rhs, qparams)
  rows = (
    activation.to_integers(
      lhs, dims.x_matrix(lhs), rule.lhs, qparams.get('lhs')
    ),
    activation.to_integers(
      rhs, dims.w_matrix(rhs).swapaxes(-1, -2), rule.rhs, qparams.get('rhs')
    ),
  )

  def on_integers(lhs, rhs, rows):
    left, right = rows
    zero = right.zero
    out = kernels.int8_matmul(
      left.codes,
      right.codes.swapaxes(-1, -2),
      x_scale=left.scale,
      w_scale=right.scale.swapaxes(-1, -2),
      x_zero=left.zero,
      w_zero=None if zero is None else zero.swapaxes(-1, -2),
      out_dtype=jnp.dtype(site.out_dtype),
    )
    return dims.out_restore(out, lhs.shape, rhs.shape)

  return _straight_through(on_integers, simulated, (lhs, rhs, qparams), rows)
