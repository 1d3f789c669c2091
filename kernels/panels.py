"""Weights of int8 codes, packed ahead in the order the cpu kernels read them.

A panel holds 64 columns. In it four rows at a time make a word of 256 bytes:
those of vectors of 64 bytes that are interleaved within each of their 16 bytes,
so that four codes along K lie together,

  byte 64 j + 16 l + 4 c + r  is row 4 i + r of column 16 l + 4 j + c

for word i, with 0 <= j, l, c, r < 4. Codes are kept as unsigned bytes, code +
128. K is filled up to whole words and N to whole panels, with codes of zero.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Int8

COLUMNS = 64
WORD = 4 * COLUMNS


@dataclasses.dataclass(frozen=True, eq=False)
class Panels:
  """An int8 weight (..., K, N) in panels; a pytree of one array.

  `int8_matmul` takes it in the place of the weight. Leading axes may be
  sliced, sharded, scanned and mapped over; panels may be sharded along theirs
  where N is a multiple of 64.

  Attributes:
    codes: uint8 (..., ceil(N / 64), ceil(K / 4), 256).
    k: the true K.
    n: the true N, of all panels.
  """

  codes: jax.Array
  k: int
  n: int

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the weight: (..., K, N)."""
    *lead, panels, _, _ = self.codes.shape
    return (*lead, self.k, _width(self.n, panels))

  @property
  def ndim(self) -> int:
    return self.codes.ndim - 1

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def dtype(self) -> jnp.dtype:
    """Dtype of the weight."""
    return jnp.dtype('int8')

  @property
  def nbytes(self) -> int:
    return math.prod(self.codes.shape)

  def reshape(self, *shape: int) -> 'Panels':
    """Splits or merges leading axes; K and N stay."""
    if shape[-2:] != self.shape[-2:]:
      raise ValueError(f'{self.shape} in panels cannot become {shape}')
    lead = shape[:-2]
    return self.of(self.codes.reshape(*lead, *self.codes.shape[-3:]))

  def of(self, codes: jax.Array) -> 'Panels':
    """Other codes of the same K and N."""
    return dataclasses.replace(self, codes=codes)

  def columns(self, at: Int[Array, ' m']) -> Int8[Array, 'k m']:
    """Single columns of a weight without leading axes."""
    panels, words, _ = self.codes.shape
    c = at % COLUMNS
    lane = 16 * (c % 16 // 4) + 4 * (c // 16) + c % 4
    q = self.codes.reshape(panels, words, COLUMNS, 4)[at // COLUMNS, :, lane]
    q = q.reshape(len(at), 4 * words)[:, : self.k].T
    return lax.bitcast_convert_type(q ^ jnp.uint8(128), jnp.int8)

  def unpack(self) -> Int8[Array, '*b k n']:
    """The weight as it was."""
    *lead, panels, words, _ = self.codes.shape
    q = self.codes.reshape(*lead, panels, words, 4, 4, 4, 4)  # p i j l c r
    at = len(lead)
    order = [at + axis for axis in (1, 5, 0, 3, 2, 4)]  # i r p l j c
    q = q.transpose(*range(at), *order)
    q = q.reshape(*lead, 4 * words, COLUMNS * panels)[..., : self.k, :]
    q = q[..., : _width(self.n, panels)]
    return lax.bitcast_convert_type(q ^ jnp.uint8(128), jnp.int8)


jax.tree_util.register_dataclass(
  Panels, data_fields=['codes'], meta_fields=['k', 'n']
)


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


def prepack(wq: Int8[Array, '*b k n'] | Panels, target: str = 'cpu') -> Panels:
  """Packs an int8 weight as a backend reads it fastest, once, ahead of its use.

  Only 8-bit codes gain: codes of fewer bits are decoded on the way to the
  product, which then waits for arithmetic as much as for memory. Do it where
  the model is made, not within the function that multiplies.

  Args:
    wq: int8 weight (..., K, N); one in panels comes back as it is.
    target: the backend; 'cpu' is the only one with a layout of its own.

  Returns:
    What `int8_matmul` takes in the place of wq. Its `unpack()` gives wq back.
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
  if wq.dtype != jnp.int8 or wq.ndim < 2:
    raise TypeError(
      'prepack takes an int8 weight of shape (..., K, N), found '
      f'{wq.dtype}{list(wq.shape)}; codes of fewer bits are read as they are '
      'stored'
    )
  *lead, k, n = wq.shape
  words, panels = -(-k // 4), -(-n // COLUMNS)
  pad = COLUMNS * panels - n
  q = lax.bitcast_convert_type(wq, jnp.uint8) ^ jnp.uint8(128)
  widths = [(0, 0)] * len(lead) + [(0, 4 * words - k), (0, pad)]
  q = jnp.pad(q, widths, constant_values=128)
  q = q.reshape(*lead, words, 4, panels, 4, 4, 4)  # i r p l j c
  at = len(lead)
  order = [at + axis for axis in (2, 0, 4, 3, 5, 1)]  # p i j l c r
  q = q.transpose(*range(at), *order)
  return Panels(q.reshape(*lead, panels, words, WORD), k, n)


def plain(w: 'jax.Array | Panels') -> jax.Array:
  """The weight as (..., K, N), whichever way it is kept."""
  return w.unpack() if isinstance(w, Panels) else w


def unpacked_first(w: 'jax.Array | Panels') -> str:
  """What a backend without panels adds to its route."""
  if not isinstance(w, Panels):
    return ''
  return ', out of panels packed for the cpu kernels, at every call'
