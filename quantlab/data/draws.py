"""Training batches: batch i is a function of the seed and i, whole or in parts.

That is what makes training resumable and spreadable: after a stop the walk
goes on at the number where it stood, and each of several processes computes
its rows of the batch that one process would see.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from quantlab.data import batches


class Draws:
  """A random-access sequence of shuffled batches, epoch after epoch.

  Every epoch is a permutation of its own; a remainder is left out of each,
  another one every time. `iterator` walks it through grain.

  Attributes:
    batch_size: examples a batch, over all processes.
  """

  def __init__(
    self,
    data: Any,
    batch_size: int,
    *,
    steps: int,
    seed: int,
    fields: Sequence[str] | None = None,
    augment: Callable[..., Any] | None = None,
    preprocess: Callable[..., Any] | None = None,
    part: tuple[int, int] = (0, 1),
  ):
    """Prepares nothing but the number of rows.

    Args:
      data: arrays, a data source of records, or anything with a length and
        `take(index) -> tuple of arrays`, such as `text.Windows`.
      batch_size: examples a batch.
      steps: batches.
      seed: of the order and of the augmentation.
      fields: of a data source of records, see `Batches`.
      augment: `(rng, *arrays) -> arrays`, on a whole batch; `rng` is a
        `np.random.RandomState` of the seed and the batch's number, from which
        it draws a row for each example.
      preprocess: `(*arrays) -> arrays`, after that.
      part: `(i, n)`: the i-th of n equal parts of every batch.

    Raises:
      ValueError: a batch larger than the data, or one that does not divide
        into the parts.
    """
    self._rows = (
      data
      if hasattr(data, 'take') and not hasattr(data, 'dtype')
      else batches.rows(data, fields)
    )
    if not 0 < batch_size <= len(self._rows):
      raise ValueError(
        f'{batch_size=}: expected 1 to {len(self._rows)}, the examples.'
      )
    index, parts = part
    if batch_size % parts:
      raise ValueError(
        f'{batch_size=} does not divide over {parts} processes; give a '
        'multiple of them.'
      )
    size = batch_size // parts
    self._mine = slice(index * size, (index + 1) * size)
    self._steps, self._seed = steps, seed
    self._augment, self._preprocess = augment, preprocess
    self.batch_size = batch_size

  def __len__(self) -> int:
    return self._steps

  def __iter__(self) -> Iterator[batches.Batch]:
    return (self[i] for i in range(self._steps))

  def __getitem__(self, i: int) -> batches.Batch:
    if not 0 <= i < self._steps:
      raise IndexError(f'batch {i} of {self._steps}')
    n = len(self._rows)
    epoch, place = divmod(i, n // self.batch_size)
    start = place * self.batch_size
    order = _order(self._seed, epoch, n)[start : start + self.batch_size]
    if self._augment is None:
      found = self._rows.take(order[self._mine])
    else:  # drawn for the whole batch: a part is augmented as in the whole
      rng = np.random.RandomState([self._seed, 1, i])
      found = self._augment(rng, *self._rows.take(order))
      found = tuple(x[self._mine] for x in found)
    if self._preprocess is not None:
      found = self._preprocess(*found)
    return found if isinstance(found, tuple) else (found,)


@functools.lru_cache(maxsize=16)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
  # RandomState's streams are frozen across NumPy releases.
  return np.random.RandomState([seed, 0, epoch]).permutation(n)


def iterator(draws: Draws) -> Iterator[batches.Batch]:
  """Walks the batches through grain, two ahead of the reader.

  `get_state()` gives its position, a small dict; `set_state` goes there.
  """
  import grain

  ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
  return iter(grain.MapDataset.source(draws).to_iter_dataset(ahead))


def crop_and_flip(
  rng: np.random.RandomState, x: np.ndarray, *rest: np.ndarray, margin: int = 4
) -> tuple[np.ndarray, ...]:
  """Shifts images (b, h, w, c) by up to `margin` pixels and mirrors half.

  What is shifted in is zero, as K. He et al. (arXiv 1512.03385) train CIFAR.
  """
  b, h, w, _ = x.shape
  padded = np.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
  down, across = rng.randint(0, 2 * margin + 1, (2, b, 1))
  mirrored = np.asarray(rng.randint(0, 2, b), bool)
  rows = (down + np.arange(h))[:, :, None]
  columns = np.arange(w) + np.zeros_like(across)
  columns[mirrored] = columns[mirrored, ::-1]
  found = padded[
    np.arange(b)[:, None, None], rows, (across + columns)[:, None, :]
  ]
  return (found, *rest)
