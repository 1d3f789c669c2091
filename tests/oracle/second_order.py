"""Error-compensated rounding in float64, row by row, as the paper states it."""

import numpy as np


def compensate(w, h, round_row, damp=0.01, order=None):
  """GPTQ (arXiv 2210.17323) on w (K, N) with h (K, K).

  Args:
    w, h: float arrays.
    round_row: `(row, k) -> row` on the grid of input k.
    damp: share of the mean diagonal.
    order: inputs in the order of rounding.
  """
  k = len(w)
  order = np.arange(k) if order is None else order
  w = w.astype(np.float64)[order]
  h = h.astype(np.float64)
  h = h + damp * np.mean(np.diag(h)) * np.eye(k)
  h = h[np.ix_(order, order)]
  u = np.linalg.cholesky(np.linalg.inv(h)).T
  out = np.zeros_like(w)
  for i in range(k):
    out[i] = round_row(w[i], order[i])
    error = (w[i] - out[i]) / u[i, i]
    w[i + 1 :] -= np.outer(u[i, i + 1 :], error)
  back = np.zeros_like(out)
  back[order] = out
  return back
