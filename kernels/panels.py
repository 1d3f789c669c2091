"""Weights packed ahead, in the order in which the cpu kernels read them.

A weight is a matrix of bytes: int8 codes, or the rows of `pack`, which hold
several codes each. A panel holds 64 columns of it. In a panel four rows at a
time make a word of 256 bytes: those of vectors of 64 bytes that are interleaved
within each of their 16 bytes, so that four bytes of one column lie together,

  byte 64 j + 16 l + 4 c + r  is row 4 i + r of column 16 l + 4 j + c

for word i, with 0 <= j, l, c, r < 4. int8 codes are kept as unsigned bytes,
code + 128, packed rows as they are. Rows are filled up to whole words and
columns to whole panels, with zeros.
"""

import dataclasses
import math
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Integer, UInt8

from quantlab_kernels import shapes

COLUMNS = 64
WORD = 4 * COLUMNS


@dataclasses.dataclass(frozen=True, eq=False)
class Panels:
  """A weight of bytes (..., rows, N) in panels; a pytree of one array.

  `int8_matmul` takes int8 codes (rows = K) in panels in the place of the
  weight; `w4a8_matmul`, `ternary_matmul` and `lut_matmul` take packed rows
  (rows = Kp). Leading axes may be sliced, sharded, scanned and mapped over;
  panels may be sharded along theirs where N is a multiple of 64.

  Attributes:
    codes: uint8 (..., ceil(N / 64), ceil(rows / 4), 256).
    rows: the true number of rows.
    n: the true N, of all panels.
    dtype: of the weight, int8 or uint8.
  """

  codes: jax.Array
  rows: int
  n: int
  dtype: np.dtype

  def _no_array(self, *_: object, **__: object) -> NoReturn:
    raise TypeError(
      f'a weight w of shape {self.shape} in panels stands where an array is '
      'needed: only the weight of a product of int8 activations may be in '
      'panels; give w.unpack()'
    )

  __array__ = __jax_array__ = _no_array

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the weight: (..., rows, N)."""
    *lead, panels, _, _ = self.codes.shape
    return (*lead, self.rows, _width(self.n, panels))

  @property
  def ndim(self) -> int:
    return self.codes.ndim - 1

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return math.prod(self.codes.shape)

  def reshape(self, *shape: int) -> 'Panels':
    """Splits or merges leading axes; rows and columns stay."""
    if shape[-2:] != self.shape[-2:]:
      raise ValueError(f'{self.shape} in panels cannot become {shape}')
    lead = shape[:-2]
    return self.of(self.codes.reshape(*lead, *self.codes.shape[-3:]))

  def of(self, codes: jax.Array) -> 'Panels':
    """Other codes of as many rows and columns."""
    return dataclasses.replace(self, codes=codes)

  def columns(self, at: Int[Array, ' m']) -> Integer[Array, 'rows m']:
    """Single columns of a weight without leading axes."""
    panels, words, _ = self.codes.shape
    c = at % COLUMNS
    lane = 16 * (c % 16 // 4) + 4 * (c // 16) + c % 4
    q = self.codes.reshape(panels, words, COLUMNS, 4)[at // COLUMNS, :, lane]
    return _from_bytes(
      q.reshape(len(at), 4 * words)[:, : self.rows].T, self.dtype
    )

  def unpack(self) -> Integer[Array, '*b rows n']:
    """The weight as it was."""
    *lead, panels, words, _ = self.codes.shape
    q = self.codes.reshape(*lead, panels, words, 4, 4, 4, 4)  # p i j l c r
    at = len(lead)
    order = [at + axis for axis in (1, 5, 0, 3, 2, 4)]  # i r p l j c
    q = q.transpose(*range(at), *order)
    q = q.reshape(*lead, 4 * words, COLUMNS * panels)[..., : self.rows, :]
    return _from_bytes(q[..., : _width(self.n, panels)], self.dtype)


jax.tree_util.register_dataclass(
  Panels, data_fields=['codes'], meta_fields=['rows', 'n', 'dtype']
)


def _from_bytes(q: UInt8[Array, '...'], dtype: np.dtype) -> Array:
  if dtype == jnp.uint8:
    return q
  return lax.bitcast_convert_type(q ^ jnp.uint8(128), jnp.int8)


def _width(n: int, panels: int) -> int:
  """Columns of so many panels: all of a weight of n columns, or a shard's.

  Raises:
    ValueError: a part of a weight whose last panel is not full.
  """
  if panels == -(-n // COLUMNS):
    return n
  if n % COLUMNS:
    raise ValueError(
      f'{panels} of the {-(-n // COLUMNS)} panels of a weight of {n} columns: '
      f'to be sharded along its columns it must have a multiple of {COLUMNS}, '
      'or be packed after it is sharded'
    )
  return COLUMNS * panels


def prepack(
  wq: Integer[Array, '*b rows n'] | Panels, target: str = 'cpu'
) -> Panels:
  """Packs a weight as a backend reads it fastest, once, ahead of its use.

  Do it where the model is made, not within the function that multiplies. The
  cpu kernels read int8 codes so, and codes of 4 and 2 bits in groups of 8 and
  16 codes or multiples of that; where else panels are given they are unpacked
  first, which `explain` says.

  Args:
    wq: int8 weight (..., K, N), or the uint8 rows (..., Kp, N) of `pack`; one
      in panels comes back as it is.
    target: the backend; 'cpu' is the only one with a layout of its own.

  Returns:
    What the products take in the place of wq. Its `unpack()` gives wq back.
  """
  if isinstance(wq, Panels):
    return wq
  if target != 'cpu':
    raise ValueError(
      f"no layout to pack ahead for {target!r}: expected 'cpu'; other backends "
      'read codes as they are stored'
    )
  if isinstance(wq, jax.ShapeDtypeStruct):
    raise TypeError(
      'prepack takes arrays, found shapes; jax.eval_shape(prepack, w) gives '
      'the shapes of what it makes'
    )
  wq = jnp.asarray(wq)
  if wq.dtype not in (jnp.int8, jnp.uint8) or wq.ndim < 2:
    raise TypeError(
      'prepack takes an int8 weight (..., K, N) or the uint8 rows (..., Kp, N) '
      f'of pack, found {wq.dtype}{list(wq.shape)}'
    )
  *lead, rows, n = wq.shape
  words, panels = -(-rows // 4), -(-n // COLUMNS)
  pad = COLUMNS * panels - n
  q = jnp.pad(wq, [(0, 0)] * len(lead) + [(0, 4 * words - rows), (0, pad)])
  if wq.dtype == jnp.int8:
    q = lax.bitcast_convert_type(q, jnp.uint8) ^ jnp.uint8(128)
  q = q.reshape(*lead, words, 4, panels, 4, 4, 4)  # i r p l j c
  at = len(lead)
  order = [at + axis for axis in (2, 0, 4, 3, 5, 1)]  # p i j l c r
  q = q.transpose(*range(at), *order)
  codes = q.reshape(*lead, panels, words, WORD)
  return Panels(codes, rows, n, np.dtype(wq.dtype))


def unreadable(k: int, bits: int, group: int) -> str | None:
  """Returns why the cpu kernels read no such codes in panels, or None."""
  if bits not in (2, 4, 8):
    return f'codes of {bits} bits straddle the bytes of panels'
  word = 32 // bits
  if group < k and group % word:
    return f'groups of {group} are no multiple of the {word} codes of a word'
  return None


def operand(w: jax.typing.ArrayLike | Panels) -> jax.Array | Panels:
  """An argument of a product as an array, or in panels.

  Raises:
    TypeError: codes of panels that are no bytes any more, or of another shape:
      what a function over the arrays of a model may do to them.
  """
  if not isinstance(w, Panels):
    return jnp.asarray(w)
  words, found = -(-w.rows // 4), w.codes
  if found.dtype != jnp.uint8 or (
    found.ndim < 3 or found.shape[-2:] != (words, WORD)
  ):
    raise TypeError(
      f'codes of panels of {w.rows} rows must be uint8 (..., panels, {words}, '
      f'{WORD}), found {found.dtype}{list(found.shape)}: leave what prepack '
      'made as it is, or pack again what is changed'
    )
  return w


def plain(w: jax.Array | Panels) -> jax.Array:
  """The weight as (..., rows, N), whichever way it is kept."""
  return w.unpack() if isinstance(w, Panels) else w


def plain_bytes(p: jax.Array | Panels) -> jax.Array:
  """The same of packed rows: uint8, of signed codes of 8 bits as well."""
  return lax.bitcast_convert_type(plain(p), jnp.uint8)


def require_packed(
  name: str, p: jax.Array | Panels, bits: int, signed: bool
) -> None:
  """Raises a TypeError unless p is of the dtype of packed rows.

  It is uint8; in panels signed codes of 8 bits are int8, as `prepack` flips
  their top bits.
  """
  eight = isinstance(p, Panels) and bits == 8 and signed
  shapes.require_dtype(name, p, jnp.int8 if eight else jnp.uint8)


def unpacked_first(w: jax.Array | Panels) -> str:
  """What a backend without panels adds to its route."""
  if not isinstance(w, Panels):
    return ''
  return ', out of panels packed for the cpu kernels, at every call'
