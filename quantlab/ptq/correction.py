"""Corrections of the mean and the variance that quantization shifts."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from quantlab.ptq.transform import Context, Tuner, Tuning


def bias_correction() -> Tuner:
  """Empirical bias correction (arXiv 1906.04721, section 4.2; 1810.05723).

  Product after product, in the order of the program: b += E[W x] - E[W_q x_q]
  for each output channel, over the calibration set, x the float and x_q the
  quantized stream. After it every corrected output has the float model's mean.
  A correction is kept in the site's state, where it costs one addition.
  """

  def run(block: Tuning) -> dict[str, Any]:
    largest = 0.0
    for group in block.groups:
      found = block.moments(group)
      for site in group:
        wanted, given = found[site.id]
        shift = wanted['mean'] - given['mean']
        block.add_bias(site, shift)
        largest = max(largest, float(jnp.max(jnp.abs(shift))))
    return {'largest_shift': largest}

  return Tuner('bias_correction', run)


def batch_norm_reestimation(epsilon: float = 1e-5) -> Tuner:
  """Re-estimates the BatchNorms under quantization (arXiv 2006.10518, 3.4).

  For products with a folded BatchNorm, in the order of the program: mean and
  variance of each output channel, y (sigma / sigma_q) + mu - mu_q (sigma /
  sigma_q), become those of the float model on the calibration set. The factor
  goes into the weight's scales.

  Args:
    epsilon: added to both variances.

  Raises:
    ValueError: epsilon is not positive; (when run) no product has a folded
      BatchNorm, or a weight has no scale of its own for each channel.
  """
  if not epsilon > 0:
    raise ValueError(f'epsilon is positive, got {epsilon}')

  def run(block: Tuning) -> dict[str, Any]:
    gains = []
    for group in block.groups:
      chosen = [s for s in group if s.fold is not None]
      if not chosen:
        continue
      found = block.moments(chosen)
      for site in chosen:
        wanted, given = found[site.id]
        gain = jnp.sqrt((wanted['var'] + epsilon) / (given['var'] + epsilon))
        block.scale_output(site, gain, wanted['mean'] - gain * given['mean'])
        gains += [float(jnp.min(gain)), float(jnp.max(gain))]
    return {'gain': [min(gains), max(gains)]} if gains else {}

  return Tuner(
    'batch_norm_reestimation', run, {'epsilon': epsilon}, _needs_batch_norms
  )


def _needs_batch_norms(ctx: Context, gains: frozenset[str]) -> None:
  del gains
  if not ctx.plan.folded:
    raise ValueError(
      'batch_norm_reestimation() has nothing to act on: it looked for '
      'quantized products whose BatchNorm the plan folds into the weight'
    )
