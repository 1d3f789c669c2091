"""What a code can mean: the interface of formats and their registry.

A format is a finite set of values and a bit pattern for each. It works in the
scaled domain: whoever calls has already divided by the scale, and adds the
zero point between rounding and encoding (see `quantlab.core.quantizer`).
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8, UInt16

Codes = UInt8[Array, '*s'] | UInt16[Array, '*s']


@dataclasses.dataclass(frozen=True)
class Format(abc.ABC):
  """A finite set of values, each with a code of `bits` bits.

  Invariants, tested for every registered format:
    decode(encode(x)) == round(x), bit for bit;
    round(v) == v for every v in `values`;
    min <= round(x) <= max, and round keeps NaN.

  Codes are bit patterns 0 .. 2^bits - 1 held in uint8 (uint16 for 16 bits).
  The code of NaN is a NaN code where the format has one, else unspecified.

  Attributes:
    name: the name it is registered under.
    bits: stored bits of one code.
  """

  name: str
  bits: int

  @property
  @abc.abstractmethod
  def max(self) -> float:
    """Largest representable value."""

  @property
  @abc.abstractmethod
  def min(self) -> float:
    """Smallest representable value."""

  @abc.abstractmethod
  def round(self, x: Float[Array, '*s']) -> Float[Array, '*s']:
    """Nearest representable value (float32), saturating; NaN stays NaN."""

  @abc.abstractmethod
  def stochastic_round(
    self, key: Array, x: Float[Array, '*s']
  ) -> Float[Array, '*s']:
    """One of the two neighbours, at random, so that the mean is x."""

  @abc.abstractmethod
  def encode(self, x: Float[Array, '*s']) -> Codes:
    """Code of the nearest representable value."""

  @abc.abstractmethod
  def decode(self, codes: Codes) -> Float[Array, '*s']:
    """Value of each code, as float32."""

  @property
  def is_integer(self) -> bool:
    """Whether every value is an integer, so that integer products apply."""
    return False

  @property
  def signed(self) -> bool:
    """Whether negative values are representable."""
    return self.min < 0

  @property
  def has_zero(self) -> bool:
    """Whether zero is representable (not so for binary, nor learned tables)."""
    return True

  @property
  def emax(self) -> int:
    """Exponent of the largest value, floor(log2(max))."""
    return math.frexp(self.max)[1] - 1

  @property
  def edge(self) -> float:
    """How far beyond min and max a value is rounded rather than clipped."""
    return 0.0

  @property
  def code_dtype(self) -> type:
    """Type of one unpacked code."""
    return jnp.uint16 if self.bits > 8 else jnp.uint8

  @property
  def stored_dtype(self) -> type:
    """Type of the bytes that packed codes are kept in."""
    return jnp.uint8

  @functools.cached_property
  def values(self) -> np.ndarray:
    """All representable values in rising order, for 8 bits and fewer."""
    if self.bits > 8:
      raise ValueError(f'{self.name} has too many values to list: {self.bits=}')
    with jax.ensure_compile_time_eval():
      v = np.asarray(self.decode(jnp.arange(2**self.bits, dtype=jnp.uint8)))
    v = np.unique(v[np.isfinite(v)])
    return v[(v >= self.min) & (v <= self.max)]

  def to_int8(self, codes: Codes) -> Array:
    """The integers that the codes stand for, as int8 operands of a product."""
    del codes
    raise TypeError(
      f'{self.name} is not an integer format, its codes have no int8 value; '
      'use decode(codes)'
    )


_FORMATS: dict[str, Format] = {}


def register(fmt: Format) -> Format:
  """Makes a format known to `get`, and so to JSON; returns it."""
  known = _FORMATS.setdefault(fmt.name, fmt)
  if known != fmt:
    raise ValueError(
      f'another format is registered as {fmt.name!r}: found {fmt}, '
      f'registered is {known}; choose another name'
    )
  return fmt


def get(name: str) -> Format:
  """The registered format of this name."""
  if name in _FORMATS:
    return _FORMATS[name]
  close = difflib.get_close_matches(str(name), _FORMATS, n=3, cutoff=0.5)
  hint = f'did you mean {" or ".join(map(repr, close))}?' if close else ''
  raise ValueError(
    f'unknown format {name!r}; {hint or "known are " + ", ".join(names())}'
  )


def names() -> list[str]:
  """Names of all registered formats."""
  return sorted(_FORMATS)


def power_of_two_below(x: Float[Array, '*s']) -> Float[Array, '*s']:
  """2^floor(log2 |x|), exactly: the exponent field of float32 alone.

  This is ldexp(1, frexp(x)[1] - 1) in three operations. (Neither log2 nor
  exp2 is exact at powers of two.) Zero and subnormals give 0, NaN and
  infinities give infinity.
  """
  bits = lax.bitcast_convert_type(x, jnp.int32)
  bits = lax.bitwise_and(bits, np.int32(0x7F800000))
  return lax.bitcast_convert_type(bits, jnp.float32)


def reciprocal_of_power(x: Float[Array, '*s']) -> Float[Array, '*s']:
  """1 / x for powers of two in [2^-126, 2^126], exactly.

  By its exponent field: division is exact on CPU, but GPUs may approximate.
  """
  bits = lax.bitcast_convert_type(x, jnp.int32)
  return lax.bitcast_convert_type(np.int32(254 << 23) - bits, jnp.float32)


def mantissa_of(x: Float[Array, '*s']) -> Float[Array, '*s']:
  """|x| / 2^floor(log2 |x|), in [1, 2), exactly, for normal float32 x."""
  bits = lax.bitcast_convert_type(x, jnp.int32)
  bits = (bits & np.int32(0x7FFFFF)) | np.int32(0x3F800000)
  return lax.bitcast_convert_type(bits, jnp.float32)


def exponent_of(x: Float[Array, '*s']) -> Array:
  """floor(log2 |x|) as int32, exactly, for normal float32 x."""
  bits = lax.bitcast_convert_type(x, jnp.int32)
  return ((bits >> 23) & 0xFF) - 127


def exact_exp2(e: Array) -> Float[Array, '*s']:
  """2^e for integer e in [-126, 127], exactly (jnp.exp2 is not)."""
  bits = (e.astype(jnp.int32) + 127) << 23
  return lax.bitcast_convert_type(bits, jnp.float32)


def nearest_even(x: Float[Array, '*s']) -> Float[Array, '*s']:
  """Rounds to an integer, halves to even."""
  return lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


def clamp(lo: float, x: Float[Array, '*s'], hi: float) -> Float[Array, '*s']:
  """min(max(x, lo), hi); NaN stays NaN."""
  return lax.clamp(np.float32(lo), x, np.float32(hi))


def stochastic_floor(key: Array, x: Float[Array, '*s']) -> Float[Array, '*s']:
  """floor(x) or floor(x) + 1, the latter with probability x - floor(x).

  The fraction is exact and compared with a uniform number; floor(x + u)
  would round the sum and be biased for large x.
  """
  low = jnp.floor(x)
  u = jax.random.uniform(key, x.shape, jnp.float32)
  return low + (u < x - low).astype(jnp.float32)
