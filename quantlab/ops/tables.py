"""Formats whose values are small multiples of one unit: exact in int8."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from quantlab.formats import Format, Minifloat


class Table(NamedTuple):
  """What the codes of a format stand for: entries * unit, exactly.

  Attributes:
    entries: int8, (2^bits,).
    unit: a power of two.
  """

  entries: np.ndarray
  unit: float


@functools.cache
def exact(format: Format) -> Table | None:
  """The values of a small float format as integers, or None.

  FP4 E2M1 is 0 to 12 halves, powers of two of four bits 0 to 64 sixty-fourths.
  NF4 and learned codebooks are multiples of nothing: rounding them to int8
  would move an entry by up to 0.4 % of the largest.
  """
  if not isinstance(format, Minifloat) or not 2 <= format.bits <= 4:
    return None
  with jax.ensure_compile_time_eval():
    codes = jnp.arange(2**format.bits, dtype=jnp.uint8)
    values = np.asarray(format.decode(codes))
  unit = float(np.abs(values[values != 0]).min())
  entries = values / unit
  if np.abs(entries).max() > 127 or (entries % 1).any():
    return None
  return Table(entries.astype(np.int8), unit)
