"""Shapes shared by the matrix products: folding axes, spreading scales."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int


def require_dtype(name: str, x: jax.Array, *dtypes) -> None:
  """Raises a TypeError unless x has one of the dtypes."""
  if x.dtype not in [jnp.dtype(d) for d in dtypes]:
    want = ' or '.join(jnp.dtype(d).name for d in dtypes)
    raise TypeError(f'{name} must be {want}, found {x.dtype} of {x.shape}')


def require_no_overflow(op: str, k: int, x_max: int, w_max: int) -> None:
  """Raises when k products of that size may leave int32."""
  limit = (2**31 - 1) // (x_max * w_max)
  if k > limit:
    raise ValueError(
      f'{op}: a contraction of {k} terms may overflow the int32 accumulator '
      f'(at most {limit} terms of magnitude {x_max} x {w_max}): split it and '
      'add the float results'
    )


def require_output(dtype: jnp.dtype, *scales) -> None:
  """Raises unless the output is floating, or the unscaled int32 sum."""
  if jnp.issubdtype(dtype, jnp.floating):
    return
  if dtype != jnp.int32:
    raise TypeError(f'out_dtype must be floating or int32, found {dtype}')
  if any(s is not None for s in scales):
    raise ValueError('int32 output is the unscaled sum: give no scales')


def fold_rows(
  name: str, x: jax.Array, lead: Sequence[int], k: int
) -> tuple[jax.Array, tuple[int, ...]]:
  """Reshapes x to (B, M, K), or to (M, K) where the weight has no lead.

  Args:
    name: how to call x in an error.
    x: shape (*lead, ..., K).
    lead: leading axes of the weight; B is their product.
    k: contraction length of the weight.

  Returns:
    The folded x, and the shape (*lead, ...) of its rows.
  """
  lead = tuple(lead)
  if (
    x.ndim < len(lead) + 1 or x.shape[: len(lead)] != lead or (x.shape[-1] != k)
  ):
    raise ValueError(
      f'{name} has shape {x.shape}, expected {(*lead, "...", k)} from the '
      f'weight: its leading axes {lead}, any rows, and its {k=}'
    )
  rows = x.shape[:-1]
  m = math.prod(rows[len(lead) :])
  return x.reshape(*_batch(lead), m, k), rows


def per_row(
  name: str,
  s: jax.typing.ArrayLike | None,
  rows: Sequence[int],
  lead: Sequence[int],
  groups: int = 1,
) -> jax.Array | None:
  """Spreads a scale or zero point of the rows of x to (B?, M, 1 | groups)."""
  if s is None:
    return None
  s = jnp.asarray(s)
  last = s.shape[-1] if s.ndim else 1
  try:
    if last not in (1, groups):
      raise ValueError('last axis')
    s = jnp.broadcast_to(s, (*rows, last))
  except ValueError as error:
    wide = f'{(*rows, groups)} or ' if groups > 1 else ''
    raise ValueError(
      f'{name} has shape {s.shape}, expected one that broadcasts to '
      f'{wide}{(*rows, 1)}'
    ) from error
  m = math.prod(tuple(rows)[len(lead) :])
  return s.reshape(*_batch(lead), m, last)


def per_column(
  name: str,
  s: jax.typing.ArrayLike | None,
  lead: Sequence[int],
  groups: int,
  n: int,
) -> jax.Array | None:
  """Spreads a scale or zero point of the weight to (B?, groups, N).

  A last axis shorter than N that divides it holds one entry per block of
  columns.
  """
  if s is None:
    return None
  s = jnp.asarray(s)
  shape = s.shape
  if s.ndim and s.shape[-1] not in (0, 1, n) and n % s.shape[-1] == 0:
    s = jnp.repeat(s, n // s.shape[-1], axis=-1)
  try:
    s = jnp.broadcast_to(s, (*lead, groups, n))
  except ValueError as error:
    raise ValueError(
      f'{name} has shape {shape}, expected one that broadcasts to '
      f'{(*lead, groups, n)}: leading axes, groups along K, columns'
    ) from error
  return s.reshape(*_batch(lead), groups, n)


def as_scale(s: jax.Array | None) -> Float[Array, '...'] | None:
  """Scales are computed with in float32, whatever they are stored in."""
  return None if s is None else s.astype(jnp.float32)


def as_zero(name: str, z: jax.Array | None) -> Int[Array, '...'] | None:
  """Zero points are integers, since zero must be represented exactly."""
  if z is None:
    return None
  if not jnp.issubdtype(z.dtype, jnp.integer):
    raise TypeError(
      f'{name} must be an integer array, found {z.dtype}; integers kept as '
      'floats need .astype(jnp.int32)'
    )
  return z.astype(jnp.int32)


def group_count(k: int, group: int | None) -> tuple[int, int]:
  """Returns (group, groups); None is one group of all of K."""
  if group is None:
    return max(k, 1), 1
  if not isinstance(group, int | np.integer) or group < 1:
    raise ValueError(f'{group=} must be a positive integer, or None')
  return group, max(-(-k // group), 1)


def split_groups(x: jax.Array, group: int, groups: int) -> jax.Array:
  """Reshapes (..., K) to (..., groups, group), zero-padding a last group."""
  k = x.shape[-1]
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, group * groups - k)])
  return x.reshape(*x.shape[:-1], groups, group)


def split_group_rows(w: jax.Array, group: int, groups: int) -> jax.Array:
  """Reshapes (K, N) to (groups, group, N), zero-padding a last group."""
  k, n = w.shape
  return jnp.pad(w, [(0, group * groups - k), (0, 0)]).reshape(groups, group, n)


def varying(y: jax.Array, operands: Sequence[jax.Array]) -> jax.Array:
  """Marks a result as varying over the axes of shard_map that operands do."""
  axes = frozenset().union(*(jax.typeof(a).mat.varying for a in operands))
  return jax.lax.pcast(y, tuple(axes), to='varying') if axes else y


def summed(
  term: Callable[..., jax.Array], parts: Any, shape: tuple[int, ...]
) -> jax.Array:
  """Adds term(*part) over the first axis of parts, in a loop, in float32."""
  y = varying(jnp.zeros(shape, jnp.float32), jax.tree.leaves(parts))
  y, _ = lax.scan(lambda y, part: (y + term(*part), None), y, parts)
  return y


def _batch(lead: Sequence[int]) -> tuple[int, ...]:
  return (math.prod(lead),) if lead else ()
