"""The embedded set: scikit-learn's handwritten digits, split once for all."""

import functools
from typing import NamedTuple

import numpy as np

TRAIN = 1297
TEST = 500


class Digits(NamedTuple):
  """Images (n, 8, 8, 1) uint8 with values 0..16; labels (n,) int32."""

  train_x: np.ndarray
  train_y: np.ndarray
  test_x: np.ndarray
  test_y: np.ndarray


@functools.cache
def digits() -> Digits:
  """1297 training and 500 test images of 8x8; nothing is downloaded.

  The split is a fixed permutation. It comes from RandomState, whose stream is
  frozen across NumPy releases, as Generator's is not: the test set is the same
  everywhere.
  """
  # scikit-learn takes half a second to import: only when digits are wanted.
  from sklearn import datasets

  bunch = datasets.load_digits()
  order = np.random.RandomState(0).permutation(TRAIN + TEST)
  x = bunch.images.astype(np.uint8)[order, :, :, None]
  y = bunch.target.astype(np.int32)[order]
  split = Digits(x[:TRAIN], y[:TRAIN], x[TRAIN:], y[TRAIN:])
  for array in split:
    array.setflags(write=False)  # the cached arrays are shared by all callers
  return split
