"""SmoothQuant (arXiv 2211.10438)."""

from __future__ import annotations

import numpy as np

from quantlab.ptq import equalize, statistics
from quantlab.ptq.transform import Context, Transform


def smooth(alpha: float = 0.5) -> Transform:
  """Moves the outlier channels of activations into the weights.

  Channel j of every quantized input is divided by (eq. 4)

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha),

  W_j over all weights that read it, and they are multiplied by it. A channel
  that is zero in X or W keeps s_j = 1.

  Args:
    alpha: how much of the difficulty moves; 1 makes all channels of X alike.

  Raises:
    ValueError: no site has a quantizer for its input.
  """
  if not 0 <= alpha <= 1:
    raise ValueError(f'alpha lies between 0 and 1, got {alpha}')

  def run(ctx: Context) -> Context:
    chosen, noted = equalize.inputs_with(ctx, 'input', 'smooth')
    matrices = statistics.weights(ctx, [s for w in chosen for s in w.sites])
    scales = []
    for where, found in zip(
      chosen, statistics.channel_ranges(ctx, chosen), strict=True
    ):
      x, w = found.absmax, statistics.weight_absmax(where, matrices)
      with np.errstate(divide='ignore'):  # channels of zeros
        s = equalize.safe(x**alpha / w ** (1 - alpha), x, w)
      scales.append((where, s))
    noted |= {where.name: equalize.facts(where, s) for where, s in scales}
    return equalize.scaled(ctx, scales).noted(smooth=noted)

  return Transform('smooth', 'prepare', run, {'alpha': alpha})
