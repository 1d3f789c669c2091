"""Values that flow through a rewritten program beside dense arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab.core import QTensor


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


# What loses a dropped parameter.
DROPPED = 'its own storage'


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Lost:
  """The result of an operation that has no rule for a quantized operand.

  It may flow on (what it feeds may be replaced by an effective weight) and
  becomes an error where it is needed.

  Attributes:
    paths: parameters that were lost, sorted.
    operation: the operation that lost the first of them, with the reason.
  """

  paths: tuple[str, ...]
  operation: str

  @classmethod
  def of(cls, lost: Iterable[Lost]) -> Lost:
    """What is lost where several lost values meet."""
    found = list(lost)
    paths = tuple(sorted({p for v in found for p in v.paths}))
    return (
      found[0] if paths == found[0].paths else cls(paths, found[0].operation)
    )

  def error(self, where: str) -> LostError:
    name = ', '.join(f"'{p}'" for p in self.paths)
    if self.operation == DROPPED:
      return LostError(
        f'parameter {name} is no longer stored, since effective weights hold '
        f'what it gave, but it is needed by {where}.'
      )
    return LostError(
      f"quantized parameter {name} reaches '{self.operation}', which has no "
      f'rule for quantized operands, and its result is needed by {where}. '
      f'Leave {name} in float (rule None), or pass strict=False to dequantize '
      'it there.'
    )


# Stands for everything that depends on the inputs, where a program is
# evaluated on its parameters alone.
UNKNOWN = Lost((), 'the inputs')


def logical(leaf: Any) -> Any:
  """Shape and dtype that the user's function sees for a stored leaf."""
  if isinstance(leaf, QTensor | Dropped):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
  return leaf
