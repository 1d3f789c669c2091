"""How much a distribution changes where it is clipped and quantized.

Entropy calibration as TensorRT has it: P is the histogram within the range,
the mass beyond added to its last bins; Q has the mass within the range evened
out over the bins of each code that are not empty. The range of least KL(P||Q)
is kept. Other than there Q is not made whole again: a range beyond which nearly
everything lies would have one bin in both, and no divergence.
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
    A scalar; infinity where no bin is in the range.
  """
  far = jnp.abs(centres).max() * 4
  low, high = rounded(jnp.stack([-far, far]))
  slack = 1e-6 * far  # the largest code may round to less than itself
  inside = (centres >= low - slack) & (centres <= high + slack)
  first, last = jnp.argmax(inside), len(centres) - 1 - jnp.argmax(inside[::-1])
  kept = jnp.where(inside, counts, 0)
  below = jnp.where(~inside & (centres < low), counts, 0).sum()
  above = jnp.where(~inside & (centres > high), counts, 0).sum()
  p = kept.at[first].add(below).at[last].add(above)
  level = rounded(centres)
  code = jnp.cumsum(jnp.diff(level, prepend=level[:1]) > 0)
  full = kept > 0
  mass = jax.ops.segment_sum(kept, code, len(centres))
  bins = jax.ops.segment_sum(full.astype(kept.dtype), code, len(centres))
  q = jnp.where(full, mass[code] / jnp.maximum(bins[code], 1), 0)
  even = inside / jnp.maximum(inside.sum(), 1)
  total = jnp.maximum(counts.sum(), 1)

  def smooth(x):
    share = (1 - SMOOTHING) * x / total + SMOOTHING * even
    return jnp.where(inside, share, 1)

  p, q = smooth(p), smooth(q)
  found = jnp.where(inside, p * jnp.log(p / q), 0).sum()
  return jnp.where(inside.any(), found, jnp.inf)
