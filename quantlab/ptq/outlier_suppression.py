"""Outlier Suppression+ (arXiv 2304.09145)."""

from __future__ import annotations

import numpy as np

from quantlab.ptq import equalize, search, statistics
from quantlab.ptq import inputs as inputs_lib
from quantlab.ptq.transform import Context, Transform


def outlier_suppression(
  *, shift: bool = True, grid: int = 40, rows: int = 256
) -> Transform:
  """Centres the channels of an input, then scales down those that stand out.

    z_j = (max X_j + min X_j) / 2                                (eq. 3)
    s_j = max(1, max|X_j - z_j| / t)                             (eq. 8)

  The threshold t is the one, of `grid` steps from the largest channel's range
  to the smallest's, that leaves the least error in the outputs of all weights
  that read the input, both operands quantized. Inputs keep z = 0 where that
  is no worse, and where nothing can take the shift: a convolution pads with
  zeros.

  Args:
    shift: whether channels are centred.
    grid: how many thresholds are tried.
    rows: of each input, on which the error is measured.

  Raises:
    ValueError: no site has a quantizer for its input.
  """
  if grid < 2 or rows < 1:
    raise ValueError(f'grid is at least 2, rows 1, got {grid=}, {rows=}')

  def run(ctx: Context) -> Context:
    chosen, noted = equalize.inputs_with(ctx, 'input', 'outlier_suppression')
    matrices = statistics.weights(ctx, [s for w in chosen for s in w.sites])
    found = statistics.samples(ctx, chosen, rows)
    for where, (bounds, sample) in zip(chosen, found, strict=True):
      centre = (bounds.hi + bounds.lo) / 2
      zero = np.zeros_like(centre)
      centred = shift and inputs_lib.no_shift(ctx, where) is None
      tried = []
      for z in (zero, centre) if centred else (zero,):
        s = _candidates(bounds, z, grid)
        errors = search.output_errors(
          ctx, where, sample, matrices, s, z=z, found=bounds
        )
        tried.append((s, errors))
      s, errors = (np.concatenate(v) for v in zip(*tried, strict=True))
      best = np.argmin(errors, 0)
      s = equalize.picked(s, best)
      z = np.where((best < grid)[..., None], zero, centre)
      moved = bool(np.any(z != 0))
      if moved:
        ctx = inputs_lib.shift_input(ctx, where, z)
      ctx = inputs_lib.scale_input(ctx, where, s)
      noted[where.name] = {
        **equalize.facts(where, s),
        'shifted': moved,
        'error': equalize.relative(errors),
      }
    return ctx.noted(outlier_suppression=noted)

  options = {'grid': grid, 'rows': rows, 'shift': shift}
  return Transform('outlier_suppression', 'prepare', run, options)


def _candidates(bounds, z, grid):
  """Scales (grid, *loops, channels), the first of them 1."""
  x = np.maximum(np.abs(bounds.lo - z), np.abs(bounds.hi - z))
  high = np.max(x, -1, keepdims=True)
  low = np.min(np.where(x > 0, x, high), -1, keepdims=True)
  low = np.maximum(low, 1e-3 * high)
  steps = np.linspace(0, 1, grid).reshape(-1, *[1] * x.ndim)
  # Of equal ratios: most of what there is to choose lies far below the largest.
  threshold = high * (low / np.where(high > 0, high, 1)) ** steps
  threshold = np.where(threshold > 0, threshold, 1)  # an input of zeros
  return equalize.safe(np.maximum(1, x / threshold))
