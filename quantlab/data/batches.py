"""Batches that can be walked any number of times, always the same."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

Batch = tuple[np.ndarray, ...]


class Batches:
  """A re-iterable of batches, each a tuple of NumPy arrays.

  Calibration and evaluation walk the data several times and must see the same
  batches each time, so the order is fixed when the object is made. The last
  batch is shorter when the batch size does not divide the examples.

  Examples:
    >>> x, y = np.arange(10), np.arange(10) % 2
    >>> batches = Batches((x, y), batch_size=4)
    >>> len(batches), [len(x) for x, y in batches]
    (3, [4, 4, 2])

  Attributes:
    batch_size: examples a batch.
    num_examples: examples over all batches.
  """

  def __init__(
    self,
    data: Any,
    batch_size: int,
    *,
    fields: Sequence[str] | None = None,
    preprocess: Callable[..., Any] | None = None,
    shuffle: bool = False,
    seed: int = 0,
    drop_remainder: bool = False,
    limit: int | None = None,
  ):
    """Prepares the order; reads nothing.

    Args:
      data: one array, a tuple of arrays of equal length, or a data source of
        records (`len`, `[i]` -> dict), as tensorflow-datasets gives.
      batch_size: examples a batch, at least 1.
      fields: the record fields that make up a batch, for a data source.
      preprocess: `(*arrays) -> array or tuple of arrays`, on a whole batch.
      shuffle: whether to permute the examples, once, by `seed`.
      seed: of the permutation.
      drop_remainder: whether to leave out a shorter last batch.
      limit: use only the first `limit` examples (of the permuted order).

    Raises:
      ValueError: no example, no whole batch, lengths that differ, or a batch
        size or limit below 1.
      TypeError: `fields` missing for a data source, or given for arrays.
    """
    for name, value in (('batch_size', batch_size), ('limit', limit)):
      if value is not None and (int(value) != value or value < 1):
        raise ValueError(f'{name} must be a positive integer; got {value!r}.')
    self._rows = rows(data, fields)
    n = len(self._rows)
    order = np.random.RandomState(seed).permutation(n) if shuffle else range(n)
    self._order = np.asarray(order, np.int64)[:limit]
    if drop_remainder:
      whole = len(self._order) // batch_size * batch_size
      if 0 < len(self._order) < batch_size:
        raise ValueError(
          f'No batch is left: {len(self._order)} examples, '
          f'{batch_size=}, drop_remainder=True. Use a batch size of at most '
          f'{len(self._order)}, or keep the remainder.'
        )
      self._order = self._order[:whole]
    if not len(self._order):
      raise ValueError('The data holds no example; at least one is needed.')
    self._preprocess = preprocess
    self.batch_size = int(batch_size)
    self.num_examples = len(self._order)

  def __len__(self) -> int:
    return -(-self.num_examples // self.batch_size)

  def __getitem__(self, i: int) -> Batch:
    if not -len(self) <= i < len(self):
      raise IndexError(f'batch {i} of {len(self)}')
    start = i % len(self) * self.batch_size
    batch = self._rows.take(self._order[start : start + self.batch_size])
    if self._preprocess is None:
      return batch
    batch = self._preprocess(*batch)
    return batch if isinstance(batch, tuple) else (batch,)

  def __iter__(self) -> Iterator[Batch]:
    if isinstance(self._rows, _Arrays):
      return (self[i] for i in range(len(self)))
    import grain

    # Reading goes on while a batch is worked on. An element is a whole batch,
    # so grain's default of hundreds in flight would be too many.
    ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    return iter(self.grain().to_iter_dataset(ahead))

  def grain(self):
    """These batches as a `grain.MapDataset`, to map, prefetch or checkpoint."""
    import grain

    return grain.MapDataset.source(self)

  def __repr__(self) -> str:
    return (
      f'Batches({self.num_examples} examples, batch_size={self.batch_size}, '
      f'{len(self)} batches)'
    )


class _Arrays:
  """Rows of arrays in memory."""

  def __init__(self, arrays: Batch):
    self.arrays = arrays

  def __len__(self) -> int:
    return len(self.arrays[0])

  def take(self, index: np.ndarray) -> Batch:
    return tuple(array[index] for array in self.arrays)


class _Records:
  """Rows of a data source of records."""

  def __init__(self, source: Any, fields: Sequence[str]):
    self.source = source
    self.fields = tuple(fields)

  def __len__(self) -> int:
    return len(self.source)

  def take(self, index: np.ndarray) -> Batch:
    positions = [int(i) for i in index]
    # One call for many records lets the reader work in parallel.
    if hasattr(self.source, '__getitems__'):
      records = self.source.__getitems__(positions)
    else:
      records = [self.source[i] for i in positions]
    return tuple(
      np.asarray([record[name] for record in records], self._dtype(name))
      for name in self.fields
    )

  def _dtype(self, name: str) -> np.dtype | None:
    """The stored dtype: a tfds source gives scalars as Python numbers."""
    info = getattr(self.source, 'dataset_info', None)
    return info.features[name].np_dtype if info is not None else None


def rows(data: Any, fields: Sequence[str] | None) -> _Arrays | _Records:
  """The rows of what a user may hand in as data."""
  if hasattr(data, 'shape'):
    data = (data,)
  if isinstance(data, tuple | list):
    if fields is not None:
      raise TypeError(f'Arrays have no fields to choose from; got {fields=}.')
    arrays = tuple(np.asarray(array) for array in data)
    if not arrays or any(array.ndim == 0 for array in arrays):
      raise ValueError(
        'Expected at least one array, each with a leading axis of examples; '
        f'got shapes {[array.shape for array in arrays]}.'
      )
    if len({len(array) for array in arrays}) > 1:
      raise ValueError(
        'The arrays must hold the same number of examples; got '
        f'{[len(array) for array in arrays]}.'
      )
    return _Arrays(arrays)
  if not (hasattr(data, '__len__') and hasattr(data, '__getitem__')):
    raise TypeError(
      'Expected arrays or a data source with a length and random access; got '
      f'{type(data).__name__}. A generator can be walked only once: collect it '
      'into arrays first.'
    )
  if not fields:
    raise TypeError(
      'A data source of records needs fields=(...): the names of the arrays '
      'that make up a batch, in order.'
    )
  return _Records(data, fields)
