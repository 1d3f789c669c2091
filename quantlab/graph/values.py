"""Values that flow through a rewritten program beside dense arrays."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Dropped:
  """Stands in the weights for a parameter that no longer has to be stored.

  Every use of it goes through an effective weight; it holds no data.
  """

  shape: tuple[int, ...]
  dtype_name: str

  @property
  def dtype(self) -> np.dtype:
    return jnp.dtype(self.dtype_name)


class LostError(TypeError):
  """A quantized or dropped parameter is needed where it has no value."""

  def __init__(self, message: str, path: str):
    super().__init__(message)
    self.path = path


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Lost:
  """The result of an operation that has no rule for a quantized operand.

  It may flow on (what it feeds may be replaced by an effective weight) and
  becomes an error where it is needed.
  """

  path: str
  operation: str

  def error(self, where: str) -> LostError:
    return LostError(
      f"quantized parameter '{self.path}' reaches '{self.operation}', which "
      f'has no rule for quantized operands, and its result is needed by '
      f"{where}. Leave '{self.path}' in float (rule None), or pass "
      'strict=False to dequantize it there.',
      self.path,
    )


def logical(leaf: Any) -> Any:
  """Shape and dtype that the user's function sees for a stored leaf."""
  if isinstance(leaf, Dropped) or hasattr(leaf, 'dequantize'):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  return leaf
