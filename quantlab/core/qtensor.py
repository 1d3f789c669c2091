"""The quantized array: packed codes with their scales, as a pytree node."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from quantlab.core import fitting, relayout, scale_formats
from quantlab.core.layout import Layout, LayoutError
from quantlab.core.qparams import QParams
from quantlab.core.quantize import check_key, decode, encode
from quantlab.core.quantizer import Quantizer
from quantlab.formats import Minifloat
from quantlab_kernels import pack, packed_rows, panels, unpack

CANONICAL = 'canonical'
PANELS = 'cpu.panels'
# Layouts of codes, by what reads them.
_LAYOUTS = {CANONICAL: CANONICAL, 'cpu': PANELS}
_CHILDREN = ('codes', 'scale', 'zero_point', 'scale2', 'codebook')


@dataclasses.dataclass(frozen=True, eq=False)
class QTensor:
  """A quantized array: what it stands for, and what it costs.

  Children (pytree leaves) share their leading loop axes, so that scan and
  vmap slice them together; everything else is static. With the tag
  'canonical':

    codes       uint8 (loops..., packed_rows(K, bits), N); int8 where the
                format is (signed integers of 8 bits)
    scale       (loops..., G, Nb), dtype of the quantizer's scale format:
                float32, bfloat16, int8 exponent, uint8 E8M0, float8_e4m3fn
    zero_point  int8, uint8 or int16 (loops..., G, Nb), or None
    scale2      float32 (loops..., 1, 1), or None
    codebook    float32 (loops..., 2^bits, Nb), or None

  Attributes:
    codes: see above; another tag arranges them otherwise (`prepack`).
    scale: see above.
    zero_point: see above.
    scale2: see above.
    codebook: see above.
    quantizer: what the codes mean.
    k: the true K, since packing rounds up.
    layout: from canonical to logical axes.
    dtype: of the logical array.
    tag: 'canonical', or the name of a layout made for one device.
    n: output length, of all shards, where the tag is not canonical.
  """

  codes: Array
  scale: Array
  zero_point: Array | None
  scale2: Array | None
  codebook: Array | None
  quantizer: Quantizer
  k: int
  layout: Layout
  dtype: np.dtype
  tag: str = CANONICAL
  n: int | None = None

  @property
  def loops(self) -> tuple[int, ...]:
    """Lengths of the loop axes."""
    return tuple(self.scale.shape[:-2])

  @property
  def columns(self) -> int:
    """The canonical N."""
    if self.tag == PANELS:
      return self.panels().shape[-1]
    return self.codes.shape[-1] if self.n is None else self.n

  @property
  def shape(self) -> tuple[int, ...]:
    """The logical shape."""
    return self.layout.shape(self.loops, self.columns)

  @property
  def ndim(self) -> int:
    """The logical rank."""
    return len(self.shape)

  @property
  def size(self) -> int:
    """The number of weights."""
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    """Bytes of all children."""
    return sum(
      math.prod(c.shape) * jnp.dtype(c.dtype).itemsize
      for c in self._children().values()
    )

  @property
  def bits_per_weight(self) -> float:
    """Bits a weight, scales and everything else included."""
    return 8 * self.nbytes / self.size

  @property
  def qparams(self) -> QParams:
    """Scales and all as float32."""
    q = self.quantizer
    scale = scale_formats.load(self.scale, q.scale_format, q.exponent_offset)
    z = self.zero_point
    return QParams(
      scale,
      None if z is None else z.astype(jnp.float32),
      self.scale2,
      self.codebook,
    )

  @property
  def packed(self) -> Array:
    """The codes as the bytes of `kernels.pack`: uint8."""
    return lax.bitcast_convert_type(self._stored(), jnp.uint8)

  def unpack(self) -> Array:
    """Codes (loops..., K, N), one in each uint8 (uint16 for 16 bits)."""
    return unpack(self.packed, self.quantizer.bits, self.k)

  def integers(self) -> Array:
    """What codes of an integer format stand for: int8 (loops..., K, N)."""
    codes = self._stored()
    if codes.dtype == jnp.int8:
      return codes
    return self.quantizer.format.to_int8(self.unpack())

  def int8_weight(self) -> Array | panels.Panels:
    """What `kernels.int8_matmul` takes: `integers`, or the codes in panels."""
    return self.panels() if self.tag == PANELS else self.integers()

  def packed_weight(self) -> Array | panels.Panels:
    """What `kernels.w4a8_matmul` takes: `packed`, or the codes in panels."""
    return self.panels() if self.tag == PANELS else self.packed

  def dequantize(self) -> Array:
    """The logical array in its dtype."""
    return _dequantize(self)

  def astype(self, dtype: Any) -> QTensor:
    """The same codes, dequantized to another dtype."""
    return dataclasses.replace(self, dtype=_logical_dtype(dtype))

  @property
  def T(self) -> QTensor:
    """The axes in reverse order."""
    return self.transpose(range(self.ndim)[::-1])

  def transpose(self, perm: Sequence[int]) -> QTensor:
    """Reorders the logical axes."""
    return self._relaid(relayout.transpose(self._axes(), perm))

  def reshape(self, shape: Sequence[int]) -> QTensor:
    """Splits and merges axes within the contraction or the output part."""
    return self._relaid(relayout.reshape(self._axes(), shape))

  def squeeze(self, axes: Sequence[int]) -> QTensor:
    """Drops axes of length one, except loop axes."""
    return self._relaid(relayout.squeeze(self._axes(), axes))

  def expand_dims(self, axes: Sequence[int]) -> QTensor:
    """Inserts axes of length one."""
    return self._relaid(relayout.expand_dims(self._axes(), axes))

  def slice(self, starts: Sequence[int], limits: Sequence[int]) -> QTensor:
    """A box of the logical array, cut along loops and the first output axis."""
    self._canonical('slice')
    axes, out = self._axes(), self
    for i, (a, start, limit) in enumerate(
      zip(axes.order, starts, limits, strict=True)
    ):
      if not 0 <= start <= limit <= axes.size(a):
        raise ValueError(f'{starts=} to {limits=} is no box of {self.shape}')
      if (start, limit) == (0, axes.size(a)):
        continue
      if a[0] == 'loop':
        out = out._cut_loop(a[1], start, limit)
      elif a == ('n', 0):
        inner = math.prod(axes.sizes['n'][1:])
        out = out._cut_columns(start * inner, limit * inner)
      else:
        kind = 'a contraction' if a[0] == 'k' else 'an inner output'
        raise LayoutError(
          f'axis {i} of {self.shape} is {kind} axis, along which codes are '
          'packed or interleaved; only loop axes and the first output axis '
          'can be sliced'
        )
    return out

  def take_columns(self, at: Array) -> QTensor:
    """Columns of the canonical (K, N) matrix, by index; no loop axes."""
    if self.loops:
      raise LayoutError(f'{self!r} has loop axes: take columns within them')
    n = self.columns

    def pick(name, child):
      if name == 'codes' and self.tag == PANELS:
        return self.panels().columns(at)
      return jnp.take(child, at, -1) if child.shape[-1] == n else child

    return dataclasses.replace(self._map_named(pick), tag=CANONICAL, n=None)

  def slice_in_loop(self, start: int, limit: int) -> QTensor:
    """Entries start to limit of the first loop axis."""
    if not self.loops:
      raise LayoutError(f'an array of shape {self.shape} has no loop axis')
    return self._cut_loop(0, start, limit)

  def _cut_loop(self, axis: int, start: int, limit: int) -> QTensor:
    index = (slice(None),) * axis + (slice(start, limit),)
    return self._map(lambda c: c[index])

  def _cut_columns(self, start: int, limit: int) -> QTensor:
    block = self.quantizer.block
    width = block[1] if block else 1
    n = self.columns
    if start % width or (limit % width and limit != n):
      raise LayoutError(
        f'columns {start} to {limit} cut through blocks of {width} columns '
        'that share a scale'
      )
    wide = slice(start, limit)
    short = slice(start // width, -(-limit // width))
    shared = self.quantizer.per in ('tensor', 'head')

    def cut(name, child):
      if name == 'codes':
        return child[..., wide]
      return child if name == 'scale2' or shared else child[..., short]

    return self._map_named(cut)

  def _axes(self) -> relayout.Axes:
    return relayout.Axes.of(self.layout, self.loops, self.columns)

  def _relaid(self, axes: relayout.Axes) -> QTensor:
    return dataclasses.replace(self, layout=axes.layout())

  def panels(self) -> panels.Panels:
    """The codes of an array that `prepack` arranged for the cpu."""
    assert self.n is not None
    rows = packed_rows(self.k, self.quantizer.bits)
    dtype = np.dtype(self.quantizer.format.stored_dtype)
    return panels.Panels(self.codes, rows, self.n, dtype)

  def _stored(self) -> Array:
    """Codes in the canonical layout, packed along K."""
    if self.tag == PANELS:
      return self.panels().unpack()
    self._canonical('read')
    return self.codes

  def _canonical(self, what: str) -> None:
    if self.tag != CANONICAL:
      raise LayoutError(
        f'cannot {what} codes arranged as {self.tag!r}: do it before '
        "ql.prepack, or after ql.prepack(model, 'canonical')"
      )

  def _children(self) -> dict[str, Array]:
    named = {name: getattr(self, name) for name in _CHILDREN}
    return {name: c for name, c in named.items() if c is not None}

  def _map(self, f) -> QTensor:
    return self._map_named(lambda _, child: f(child))

  def _map_named(self, f) -> QTensor:
    new = {name: f(name, c) for name, c in self._children().items()}
    return dataclasses.replace(self, **new)

  def __repr__(self) -> str:
    if not hasattr(self.scale, 'shape'):  # a tree of labels, shapes, ...
      held = ', '.join(f'{k}={v!r}' for k, v in self._children().items())
      return f'QTensor({held})'
    return (
      f'QTensor(shape={self.shape}, dtype={self.dtype.name}, '
      f'quantizer={self.quantizer!r}, tag={self.tag!r})'
    )


jax.tree_util.register_dataclass(
  QTensor,
  data_fields=list(_CHILDREN),
  meta_fields=['quantizer', 'k', 'layout', 'dtype', 'tag', 'n'],
)


def quantize(
  w: Array,
  quantizer: Quantizer,
  layout: Layout,
  qparams: QParams | None = None,
  key: Array | None = None,
) -> QTensor:
  """Quantizes a logical array.

  Args:
    w: the array, of a real floating dtype.
    quantizer: how.
    layout: which axes are contracted (see `Layout.of`).
    qparams: parameters in the canonical layout; fitted to w when None.
    key: for rounding='stochastic'.
  """
  fitting.check_float(w, quantizer)
  check_key(quantizer, key)
  return _quantize(jnp.asarray(w), qparams, key, quantizer, layout)


@functools.partial(jax.jit, static_argnames=('quantizer', 'layout'))
def _quantize(w, qparams, key, quantizer, layout) -> QTensor:
  x = layout.to_canonical(w)
  if qparams is None:
    qparams = fitting.fit(x, quantizer)
  codes = encode(x, quantizer, qparams, key=key)
  return assemble(codes, quantizer, qparams, layout, w.dtype)


@jax.jit
def _dequantize(q: QTensor) -> Array:
  y = decode(q.unpack(), q.quantizer, q.qparams)
  return q.layout.to_logical(y).astype(q.dtype)


def assemble(
  codes: Array,
  quantizer: Quantizer,
  qparams: QParams,
  layout: Layout,
  dtype: Any,
) -> QTensor:
  """A QTensor of unpacked codes (loops..., K, N) and their parameters."""
  q, z = quantizer, qparams.zero_point
  if z is not None:
    z = z.astype(_zero_point_dtype(q))
  packed = pack(codes, q.bits)
  return QTensor(
    codes=lax.bitcast_convert_type(packed, q.format.stored_dtype),
    scale=scale_formats.store(qparams.scale, q.scale_format, q.exponent_offset),
    zero_point=z,
    scale2=qparams.scale2,
    codebook=qparams.codebook,
    quantizer=q,
    k=codes.shape[-2],
    layout=layout,
    dtype=_logical_dtype(dtype),
  )


def may_prepack(q: QTensor) -> bool:
  """Whether products of int8 activations read the codes in panels.

  They are integers or small floats, of widths and groups that panels hold.
  """
  z = q.quantizer
  integer = z.format.is_integer and z.format.has_zero
  small = isinstance(z.format, Minifloat) and z.bits <= 4
  group = (z.block[0] if z.block else z.group) or q.k
  fits = panels.unreadable(q.k, z.bits, group) is None
  return fits and (integer or small)


def check_target(target: str) -> None:
  """Raises a ValueError unless there is a layout of that name."""
  if target not in _LAYOUTS:
    raise ValueError(
      f'no layout to pack codes ahead for {target!r}: expected one of '
      f'{sorted(_LAYOUTS)}'
    )


def prepack(q: QTensor, target: str = 'cpu') -> QTensor:
  """The same array, its codes arranged as a target reads them fastest.

  Args:
    q: an array of codes of 8, 4 or 2 bits, in groups that are multiples of 4,
      8 or 16 codes.
    target: 'cpu', or 'canonical' to undo it.

  Returns:
    An array equal to q; the loops stay in front, so that scan and vmap slice
    it as before.
  """
  check_target(target)
  if q.tag == _LAYOUTS[target]:
    return q
  if target == CANONICAL:
    return dataclasses.replace(q, codes=q._stored(), tag=CANONICAL, n=None)
  if not may_prepack(q):
    raise ValueError(
      f'{q!r} cannot be packed ahead: expected integers or small floats '
      'of 8, 4 or 2 bits, in groups that are multiples of 4, 8 or 16 codes; '
      'others are read as stored'
    )
  codes = panels.prepack(q.codes).codes
  return dataclasses.replace(q, codes=codes, tag=PANELS, n=q.columns)


def concatenate(tensors: Sequence[QTensor], axis: int) -> QTensor:
  """Joins along the first output axis or a loop axis, codes untouched."""
  first, ndim = tensors[0], tensors[0].ndim
  for t in tensors:
    t._canonical('concatenate')
    for name in ('quantizer', 'k', 'dtype', 'layout'):
      if getattr(t, name) != getattr(first, name):
        raise LayoutError(
          f'cannot concatenate arrays of different {name}: '
          f'{getattr(first, name)} and {getattr(t, name)}'
        )
  part, i = first._axes().order[axis % ndim]
  if part == 'loop':
    return _joined(tensors, dict.fromkeys(_CHILDREN, i))
  if (part, i) != ('n', 0):
    raise LayoutError(
      f'axis {axis} of {first.shape} is not a loop axis or the first output '
      'axis; codes are packed or interleaved along it'
    )
  q = first.quantizer
  width = q.block[1] if q.block else 1
  if any(t.columns % width for t in tensors[:-1]):
    raise LayoutError(
      f'{q!r} has blocks of {width} columns, which do not divide the arrays'
    )
  if q.per in ('tensor', 'head') or first.scale2 is not None:
    raise LayoutError(
      f'{q!r} has one scale for all columns, and the arrays have scales of '
      'their own'
    )
  return _joined(tensors, dict.fromkeys(_CHILDREN, -1))


def _joined(tensors: Sequence[QTensor], axes: dict[str, int]) -> QTensor:
  def join(name, _):
    return jnp.concatenate([getattr(t, name) for t in tensors], axes[name])

  return tensors[0]._map_named(join)


def _zero_point_dtype(quantizer: Quantizer) -> type:
  if not quantizer.format.signed:
    return jnp.uint8
  return jnp.int8 if quantizer.bits <= 8 else jnp.int16


def _logical_dtype(dtype: Any) -> np.dtype:
  dtype = jnp.dtype(dtype)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(f'a quantized array stands for floats, not {dtype}')
  return dtype
