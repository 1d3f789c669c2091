"""Predictors of objectives from the options of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from sklearn import ensemble, linear_model


class Predictor(Protocol):
  """A regression of one objective."""

  def fit(self, x: np.ndarray, y: np.ndarray) -> Predictor:
    """Learns from one-hot rows (n, features) and values (n,)."""

  def predict(self, x: np.ndarray) -> np.ndarray:
    """Values (n,)."""


def one_hot(choices: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
  """Choices (n, rows) as 0 and 1, (n, sum of sizes)."""
  parts = [np.eye(k)[choices[:, i]] for i, k in enumerate(sizes)]
  return np.concatenate(parts, axis=1)


def ridge(alpha: float = 1.0) -> Predictor:
  """Additive in the options, as SimQ-NAS has it (arXiv 2312.13301)."""
  return linear_model.Ridge(alpha)


def boosted(seed: int = 0) -> Predictor:
  """Boosted trees, as Quantune has them (arXiv 2202.05048)."""
  return ensemble.HistGradientBoostingRegressor(
    max_iter=50, max_depth=3, min_samples_leaf=3, random_state=seed
  )


class Transferred:
  """A predictor of one model, corrected for another (APQ, arXiv 2006.08509).

    y = a source(x) + b + correction(x)

  a and b by least squares, the correction on what they leave; with few
  measurements of the new model most is known from the old one.

  Args:
    source: fitted on another model with the same options.
    correction: of the rest.
  """

  def __init__(self, source: Predictor, correction: Predictor | None = None):
    self.source = source
    self.correction = correction or ridge(10.0)
    self.line = np.array([1.0, 0.0])

  def fit(self, x: np.ndarray, y: np.ndarray) -> Transferred:
    """See `Predictor`."""
    known = self.source.predict(x)
    design = np.stack([known, np.ones_like(known)], 1)
    self.line = np.linalg.lstsq(design, y, rcond=None)[0]
    self.correction.fit(x, y - design @ self.line)
    return self

  def predict(self, x: np.ndarray) -> np.ndarray:
    """See `Predictor`."""
    known = self.source.predict(x) * self.line[0] + self.line[1]
    return known + self.correction.predict(x)
