"""Checking calibration batches before work starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

_EMPTY = (
  'there is no batch to trace the function, to find activation ranges or to '
  'measure with. Pass at least one, in a list or another object that can be '
  'read more than once'
)


def arguments(batch: Any) -> tuple[Any, ...]:
  """How a batch is passed: a tuple is splatted, anything else is one."""
  return tuple(batch) if isinstance(batch, tuple) else (batch,)


def check_reiterable(batches: Iterable[Any]) -> None:
  """Refuses batches that end when they are read.

  Raises:
    TypeError: says what was found.
  """
  if isinstance(batches, Iterator):
    raise TypeError(
      'batches must be re-iterable (they are read several times), got the '
      f'one-shot iterator {type(batches).__name__}; pass a list, or an object '
      'with __iter__'
    )


def refuse_empty(batch: Any, name: str) -> None:
  """Refuses a batch with an array that has no examples.

  Raises:
    ValueError: says which batch, by its name.
  """
  if any(np.shape(x)[:1] == (0,) for x in jax.tree.leaves(batch)):
    raise ValueError(
      f'{name} is empty: it has an array without examples (first axis 0). '
      'Remove the batch'
    )


def first(batches: Iterable[Any]) -> tuple[Any, ...]:
  """Arguments of the first batch.

  Raises:
    TypeError: `batches` is not re-iterable, or is one batch instead of many.
    ValueError: there is none.
  """
  if isinstance(batches, Mapping | str) or hasattr(batches, 'shape'):
    # Iterating would take keys, letters or single rows for batches.
    raise TypeError(
      f'batches are given as a list, got one {type(batches).__name__}; '
      'pass [batch]'
    )
  if not isinstance(batches, Iterable):
    raise TypeError(
      f'batches are given as a list, got {batches!r}; pass at least one '
      'batch, as [batch]'
    )
  check_reiterable(batches)
  for batch in batches:
    return arguments(batch)
  raise ValueError(_EMPTY)


def checked(batches: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
  """Arguments of every batch; refuses one that differs from the first.

  Leading axes may differ (a last, smaller batch); all else must agree.

  Raises:
    ValueError: names the batch and both shapes; or there is no batch, or one
      without examples.
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
    refuse_empty(args, f'calibration batch {index}')
    yield args
  if reference is None:
    raise ValueError(_EMPTY)


def same_shapes(batches: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
  """`checked`, where also the first axes must agree.

  Raises:
    ValueError: names the batch and both shapes.
  """
  reference = None
  for index, args in enumerate(checked(batches)):
    shapes = [np.shape(x) for x in jax.tree.leaves(args)]
    reference = reference or shapes
    if shapes != reference:
      raise ValueError(
        f'calibration batch {index} has the shapes {shapes}, the first batch '
        f'{reference}: block by block the program runs for one shape. Choose a '
        'batch size that divides the examples, or leave the last batch out'
      )
    yield args


def _describe(args: tuple[Any, ...]) -> str:
  def one(x):
    x = x if hasattr(x, 'shape') else np.asarray(x)
    if not x.shape:
      return str(x.dtype)
    return f'{x.dtype}[*{"".join(f", {n}" for n in x.shape[1:])}]'

  return str(jax.tree.map(one, args)).replace("'", '')
