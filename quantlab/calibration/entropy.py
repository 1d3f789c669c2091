"""How much a distribution changes where it is clipped and quantized.

Entropy calibration as TensorRT has it: P is the histogram within the range,
the mass beyond added to its last bins; Q has the mass within the range evened
out over the bins of each code that are not empty. The range of least KL(P||Q)
is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

SMOOTHING = 1e-4  # share of the mass spread over all bins in the range


def divergence(
  counts: jax.Array,
  centres: jax.Array,
  rounded: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  """KL(clipped || quantized), nats.

  Args:
    counts: (bins,) how many values fell into each bin.
    centres: (bins,) of the bins, ascending.
    rounded: values that the quantizer makes of others, monotone.

  Returns:
    A scalar.
  """
  far = jnp.abs(centres).max() * 4
  low, high = rounded(jnp.stack([-far, far]))
  inside = (centres >= low) & (centres <= high)
  first, last = jnp.argmax(inside), len(centres) - 1 - jnp.argmax(inside[::-1])
  kept = jnp.where(inside, counts, 0)
  below = jnp.where(centres < low, counts, 0).sum()
  above = jnp.where(centres > high, counts, 0).sum()
  p = kept.at[first].add(below).at[last].add(above)
  level = rounded(centres)
  code = jnp.cumsum(jnp.diff(level, prepend=level[:1]) > 0)
  full = kept > 0
  mass = jax.ops.segment_sum(kept, code, len(centres))
  bins = jax.ops.segment_sum(full.astype(kept.dtype), code, len(centres))
  q = jnp.where(full, mass[code] / jnp.maximum(bins[code], 1), 0)
  p, q = _smooth(p, inside), _smooth(q, inside)
  return jnp.where(inside, p * jnp.log(p / jnp.where(inside, q, 1)), 0).sum()


def _smooth(x: jax.Array, inside: jax.Array) -> jax.Array:
  """A distribution over the bins inside, none of them without mass."""
  even = inside / jnp.maximum(inside.sum(), 1)
  share = x / jnp.maximum(x.sum(), 1e-30)
  return jnp.where(inside, (1 - SMOOTHING) * share + SMOOTHING * even, 1)
