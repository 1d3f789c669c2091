"""One-dimensional k-means, batched: learned codebooks.

References:
  Lloyd, Least squares quantization in PCM, 1982. The start, half quantiles
  and half even spacing, keeps centres in the tails (SqueezeLLM starts from
  quantiles, arXiv 2306.07629).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


@functools.partial(jax.jit, static_argnames=('k', 'iterations'))
def kmeans(
  x: Float[Array, '*b n'],
  k: int,
  weight: Float[Array, '*b n'] | None = None,
  iterations: int = 25,
) -> Float[Array, '*b k']:
  """Centres c minimizing sum_i weight_i min_j (x_i - c_j)^2, row by row.

  The objective does not increase from one iteration to the next. A centre
  without elements stays where it is.

  Args:
    x: rows of numbers.
    k: number of centres.
    weight: nonnegative importance of each number; 1 by default.
    iterations: of Lloyd's algorithm.

  Returns:
    The centres in rising order.
  """
  weight = jnp.ones_like(x) if weight is None else weight
  start = _start(x, weight, k)
  return lax.fori_loop(0, iterations, lambda _, c: _lloyd(x, weight, c), start)


def assign(x: Float[Array, '*b n'], centres: Float[Array, '*b k']) -> Array:
  """Index of the nearest centre (rising order), the lower one on a tie."""
  cut = (centres[..., 1:] + centres[..., :-1]) / 2
  above = x[..., None, :] > cut[..., :, None]
  return jnp.sum(above, axis=-2, dtype=jnp.int32)


def _start(x: Array, weight: Array, k: int) -> Array:
  x, weight = lax.sort((x, weight), num_keys=1)
  mass = jnp.cumsum(weight, axis=-1)
  share = (jnp.arange(k, dtype=jnp.float32) + 0.5) / k
  # Rank of the element at which each share of the mass is reached.
  reached = mass[..., None, :] < share[:, None] * mass[..., -1:, None]
  rank = jnp.minimum(jnp.sum(reached, axis=-1), x.shape[-1] - 1)
  quantiles = jnp.take_along_axis(x, rank, axis=-1)
  low, high = x[..., :1], x[..., -1:]
  spaced = low + (high - low) * jnp.linspace(0, 1, k, dtype=x.dtype)
  return (quantiles + spaced) / 2


def _lloyd(x: Array, weight: Array, centres: Array) -> Array:
  index = assign(x, centres)

  def mean(j):
    w = jnp.where(index == j, weight, 0)
    total = jnp.sum(w, axis=-1)
    c = jnp.sum(w * x, axis=-1) / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, c, centres[..., j])

  # Centre by centre: a one-hot matrix would take k times the memory of x.
  out = lax.map(mean, jnp.arange(centres.shape[-1]))
  return jnp.moveaxis(out, 0, -1)
