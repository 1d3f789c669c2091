"""Checking calibration batches before work starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np


def arguments(batch: Any) -> tuple[Any, ...]:
  """How a batch is passed: a tuple is splatted, anything else is one."""
  return tuple(batch) if isinstance(batch, tuple) else (batch,)


def first(batches: Iterable[Any]) -> tuple[Any, ...]:
  """Arguments of the first batch.

  Raises:
    TypeError: `batches` is not re-iterable.
    ValueError: there is none.
  """
  if isinstance(batches, Iterator):
    raise TypeError(
      'calibration batches must be re-iterable (they are read more than '
      f'once), got the one-shot iterator {type(batches).__name__}; pass a '
      'list, or an object with __iter__'
    )
  for batch in batches:
    return arguments(batch)
  raise ValueError(
    'calibration is empty: no batch to trace the function or to find '
    'activation ranges with. Pass at least one batch'
  )


def checked(batches: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
  """Arguments of every batch; refuses one that differs from the first.

  Leading axes may differ (a last, smaller batch); all else must agree.

  Raises:
    ValueError: names the batch and both shapes.
  """
  reference = None
  for index, batch in enumerate(batches):
    args = arguments(batch)
    described = _describe(args)
    if reference is None:
      reference = described
    elif described != reference:
      raise ValueError(
        f'calibration batch {index} is {described}, the first batch was '
        f'{reference}: batches must agree in structure, dtype and every axis '
        'but the first'
      )
    yield args


def _describe(args: tuple[Any, ...]) -> str:
  def one(x):
    x = x if hasattr(x, 'shape') else np.asarray(x)
    if not x.shape:
      return str(x.dtype)
    return f'{x.dtype}[*{"".join(f", {n}" for n in x.shape[1:])}]'

  return str(jax.tree.map(one, args)).replace("'", '')
