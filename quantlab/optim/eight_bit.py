"""Optimizer states in 8 bits, block by block (arXiv 2110.02861).

Around any optax optimizer: its moments are kept as quantized arrays, turned
back to float32 before each update and quantized again after it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from quantlab import core, formats
from quantlab.core import Layout, QTensor, Quantizer, is_qtensor

# What the fields of the optimizers' states hold: 'signed' and 'unsigned'
# moments, the latter never negative by construction; 'float' is left alone.
# 'Class.field' goes before 'field'.
FIELDS: Mapping[str, str] = {
  **dict.fromkeys(
    ('mu', 'trace', 'ema', 'm', 'm1', 'm2', 'v', 'g', 'exp_avg'), 'signed'
  ),
  **dict.fromkeys(
    ('acc_grads', 'avg_grad', 'previous_gradient', 'prev_updates'), 'signed'
  ),
  **dict.fromkeys(
    ('nu', 'nu_max', 'n', 'sum_of_squares', 'exp_avg_sq', 'e_g', 'e_x'),
    'unsigned',
  ),
  **dict.fromkeys(('v_row', 'v_col', 'FactoredState.v'), 'unsigned'),
  'SophiaState.nu': 'signed',  # a Hessian's diagonal
  **dict.fromkeys(
    ('z', 'x0', 'params', 'params0', 'init_params', 'cache', 'latents'),
    'float',
  ),
  **dict.fromkeys(('slow', 'hyperparams', 'step_sizes', 'qparams'), 'float'),
}
_FORMATS = {'signed': 'dynamic8', 'unsigned': 'udynamic8'}
_KINDS = (*_FORMATS, 'float')


def eight_bit(
  optimizer: optax.GradientTransformation,
  *,
  block: int = 256,
  min_size: int = 4096,
  fields: Mapping[str, str] = FIELDS,
) -> optax.GradientTransformationExtraArgs:
  """An optimizer whose moments are stored in 8 bits.

  Every float32 array of at least `min_size` elements in the state becomes a
  `QTensor` of the dynamic 8-bit format, signed or unsigned, with one float32
  scale, the largest magnitude, for each block. Blocks run along the last axis
  of the array; where that is shorter than a block, along as many trailing
  axes as it takes. The axes before them stay axes, so that an array that is
  sharded over them stays so. With blocks of 256 the state takes at most
  0.26 of the bytes of float32.

  Which format an array gets is settled by the field of the state that it
  stands in, before any number is known. A second moment that is not zero is
  never rounded to zero: a parameter would be divided by nothing but epsilon.

  The paper keeps the moments of embedding tables in 32 bits: wrap them apart,
  with `optax.multi_transform`.

  Args:
    optimizer: any optax transformation.
    block: elements that share a scale.
    min_size: smaller arrays stay in float32.
    fields: what the fields of the state hold, by name or 'Class.field':
      'signed', 'unsigned' or 'float' (not quantized).

  Returns:
    A transformation of the same arguments; its state is the state of
    `optimizer` with `QTensor`s in it.

  Raises:
    TypeError: no transformation.
    ValueError: sizes that are not positive integers, a kind that is not
      known; from `init`: a large array in a field that is not in `fields`.
  """
  for name, size in (('block', block), ('min_size', min_size)):
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
      raise ValueError(f'{name} takes a positive integer, found {size!r}')
  if wrong := {k: v for k, v in fields.items() if v not in _KINDS}:
    raise ValueError(f'fields= takes {list(_KINDS)}, found {wrong}')
  if not hasattr(optimizer, 'init'):
    raise TypeError(
      f'eight_bit takes an optax transformation such as optax.adam(1e-3), '
      f'found {optimizer!r}'
    )
  optimizer = optax.with_extra_args_support(optimizer)

  def store(kind: str | None, where: str, x: Any) -> Any:
    if not _is_moment(x, min_size) or kind == 'float':
      return x
    if kind is None:
      raise ValueError(
        f'the optimizer keeps float32 of shape {x.shape} in {where!r}, a '
        'field that eight_bit does not know: say what it holds with '
        f'fields={{**FIELDS, {where.rpartition(".")[2]!r}: ...}}, one of '
        f'{list(_KINDS)}'
      )
    return _stored(x, kind, block)

  def init(params):
    return _visit(optimizer.init(params), store, fields)

  def update(updates, state, params=None, **extra):
    state = jax.tree.map(
      lambda x: x.dequantize() if is_qtensor(x) else x,
      state,
      is_leaf=is_qtensor,
    )
    updates, state = optimizer.update(updates, state, params, **extra)
    return updates, _visit(state, store, fields)

  return optax.GradientTransformationExtraArgs(init, update)


def _is_moment(x: Any, min_size: int) -> bool:
  return (
    isinstance(x, jax.Array | jax.ShapeDtypeStruct)
    and x.dtype == jnp.float32
    and x.size >= min_size
  )


def _stored(x: jax.Array, kind: str, block: int) -> QTensor:
  """An array as 8-bit codes with a scale for each block."""
  axes = 1
  while axes < x.ndim and math.prod(x.shape[-axes:]) < block:
    axes += 1
  split = x.ndim - axes
  layout = Layout.of(x.shape, range(split, x.ndim), range(split))
  quantizer = Quantizer(formats.get(_FORMATS[kind]), group=block, ragged=True)
  canonical = layout.to_canonical(x)
  qparams = core.fit(canonical, quantizer)
  codes = core.encode(canonical, quantizer, qparams)
  if kind == 'unsigned':
    codes = jnp.maximum(codes, (canonical > 0).astype(codes.dtype))
  return core.assemble(codes, quantizer, qparams, layout, x.dtype)


def _visit(
  state: Any,
  store: Callable[[str | None, str, Any], Any],
  fields: Mapping[str, str],
  where: str = 'state',
) -> Any:
  """`store(kind, where, leaf)` for every leaf of an optimizer's state.

  The outermost field that is known settles the kind of all below it, so that
  the names of the user's own parameters are never read.
  """

  def node(x):
    if not _is_record(x):
      return store(None, where, x)
    new = {}
    for name, value in x._asdict().items():
      full = f'{type(x).__name__}.{name}'
      kind = fields.get(full, fields.get(name))
      if kind is None:
        new[name] = _visit(value, store, fields, full)
      else:
        put = functools.partial(store, kind, full)
        new[name] = jax.tree.map(put, value)
    return x._replace(**new)

  return jax.tree.map(node, state, is_leaf=_is_record)


def _is_record(x: Any) -> bool:
  return isinstance(x, tuple) and hasattr(x, '_fields')
