"""Activation-aware weight quantization (arXiv 2306.00978)."""

from __future__ import annotations

import numpy as np

from quantlab.ptq import equalize, search, statistics
from quantlab.ptq.statistics import Range
from quantlab.ptq.transform import Context, Transform


def awq(grid: int = 20, *, rows: int = 256) -> Transform:
  """Scales up the weights of channels that carry large activations.

  Channel j of an input is divided by s_j = mean|X_j|^r (eq. 5), normalized by
  sqrt(max s min s). The exponent r in {0, 1/grid, ..., 1 - 1/grid} is the one
  that leaves the least error in the outputs of all weights that read the
  input, with only the weights quantized; r = 0 is rounding to nearest. The
  paper's second step, clipped ranges that leave the least error in the outputs,
  is not done; `scale=ql.scales.mse()` clips by the error of the weights.

  Args:
    grid: how many exponents are tried.
    rows: of each input, on which the error is measured.

  Raises:
    ValueError: no site has a quantizer for its weight.
  """
  if grid < 1 or rows < 1:
    raise ValueError(f'grid and rows are at least 1, got {grid=}, {rows=}')
  exponents = np.arange(grid, dtype=np.float32) / grid

  def run(ctx: Context) -> Context:
    chosen, noted = equalize.inputs_with(ctx, 'weight', 'awq')
    matrices = statistics.weights(ctx, [s for w in chosen for s in w.sites])
    scales = []
    for where, (found, sample) in zip(
      chosen, statistics.samples(ctx, chosen, rows), strict=True
    ):
      candidates = _candidates(found, exponents)
      errors = search.output_errors(ctx, where, sample, matrices, candidates)
      best = np.argmin(errors, 0)
      s = equalize.picked(candidates, best)
      scales.append((where, s))
      noted[where.name] = {
        **equalize.facts(where, s),
        'exponent': exponents[best].tolist(),
        'error': equalize.relative(errors),
      }
    return equalize.scaled(ctx, scales).noted(awq=noted)

  return Transform('awq', 'prepare', run, {'grid': grid, 'rows': rows})


def _candidates(found: Range, exponents):
  """Scales (grid, *loops, channels); 1 for channels that are never used."""
  x = found.mean
  live = x > 0
  r = exponents.reshape(-1, *[1] * x.ndim)
  s = np.maximum(np.where(live, x, 1), 1e-4) ** r
  low = np.min(s, -1, keepdims=True, where=live, initial=np.inf)
  high = np.max(s, -1, keepdims=True, where=live, initial=0)
  # Not the root of the product, which may overflow.
  return equalize.safe(s / (np.sqrt(high) * np.sqrt(low)), live)
