"""A function computed one way and differentiated another."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from quantlab_kernels.whole import jvp_along, whole


def differentiated_as(f: Callable, g: Callable, *args: Any) -> Any:
  """Returns f(*args), with the derivatives of g.

  `g` runs only where something is differentiated, and is differentiated only
  along the arrays that vary: its derivative along the others need not exist.

  Args:
    f: what is computed.
    g: what is differentiated; returns the shapes and dtypes of f.
    args: of both; trees of arrays.
  """
  leaves, tree = jax.tree.flatten(args)
  h = jax.custom_jvp(lambda *leaves: f(*jax.tree.unflatten(tree, leaves)))

  def jvp(primals, tangents):
    y = whole(h, *primals)
    flat = lambda *leaves: g(*jax.tree.unflatten(tree, leaves))  # noqa: E731
    return y, tangent(flat, primals, tangents, y)

  h.defjvp(jvp, symbolic_zeros=True)
  return h(*leaves)


def tangent(
  g: Callable, primals: Sequence[Any], tangents: Sequence[Any], y: Any
) -> Any:
  """The tangent of g(*primals), which looks like y.

  Args:
    g: of arrays, or of None.
    primals: where.
    tangents: a symbolic zero or None along what does not vary.
    y: a result of the same shapes and dtypes.
  """
  given = [
    not (a is None or t is None or isinstance(t, SymbolicZero))
    and t.dtype != jax.dtypes.float0
    for a, t in zip(primals, tangents, strict=True)
  ]
  if not any(given):
    return jax.tree.map(_still, y)
  return jvp_along(g, primals, tangents, given)[1]


def _still(y):
  """The tangent of what does not vary."""
  if jnp.issubdtype(y.dtype, jnp.inexact):
    return jnp.zeros_like(y)
  return np.zeros(y.shape, jax.dtypes.float0)
