"""Batches: the same every time, whole, in order, and clear when wrong."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab import data


class Records:
  """A random-access source of records, as tfds and grain know it."""

  def __init__(self, n):
    self.n = n

  def __len__(self):
    return self.n

  def __getitem__(self, i):
    return {'x': np.full((2,), i, np.uint8), 'y': i % 3}


@settings(max_examples=60, deadline=None)
@given(
  n=st.integers(1, 40),
  size=st.integers(1, 12),
  shuffle=st.booleans(),
  seed=st.integers(0, 5),
)
def test_covers_every_example_once_and_repeats(n, size, shuffle, seed):
  batches = data.Batches(
    (np.arange(n), np.arange(n) * 2), size, shuffle=shuffle, seed=seed
  )
  first, second = list(batches), list(batches)
  assert len(batches) == len(first) == -(-n // size)
  assert batches.num_examples == n
  for a, b in zip(first, second, strict=True):
    np.testing.assert_array_equal(a[0], b[0])
  rows = np.concatenate([x for x, _ in first])
  assert sorted(rows) == list(range(n))
  np.testing.assert_array_equal(np.concatenate([y for _, y in first]), rows * 2)
  assert all(len(x) == size for x, _ in first[:-1])
  if not shuffle:
    np.testing.assert_array_equal(rows, np.arange(n))


def test_seed_decides_the_order():
  def order(seed):
    batches = data.Batches(np.arange(50), 50, shuffle=True, seed=seed)
    return list(batches[0][0])

  assert order(1) == order(1) != order(2)
  assert order(1) != list(range(50))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), size=st.integers(1, 10))
def test_drop_remainder_keeps_whole_batches_only(n, size):
  def make():
    return data.Batches(np.arange(n), size, drop_remainder=True)

  if n < size:
    with pytest.raises(ValueError, match='No batch is left'):
      make()
    return
  batches = list(make())
  assert len(batches) == n // size
  assert {len(x) for (x,) in batches} == {size}


def test_records_through_grain_equal_indexing():
  batches = data.Batches(
    Records(11),
    4,
    fields=('y', 'x'),
    shuffle=True,
    preprocess=lambda y, x: (x.astype(np.float32), y),
  )
  walked = list(batches)
  assert [len(y) for _, y in walked] == [4, 4, 3]
  for i, (x, y) in enumerate(walked):
    np.testing.assert_array_equal(x, batches[i][0])
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x[:, 0] % 3, y)
  for a, b in zip(walked, batches, strict=True):
    np.testing.assert_array_equal(a[0], b[0])


def test_walking_may_stop_early_and_start_again():
  batches = data.Batches(Records(30), 2, fields=('y',))
  for _ in batches:
    break
  assert len(list(batches)) == 15


def test_grain_view_is_a_map_dataset():
  batches = data.Batches(np.arange(10), 3)
  view = batches.grain().map(lambda batch: batch[0].sum())
  assert [int(v) for v in view] == [3, 12, 21, 9]


def test_limit_takes_the_first_of_the_order():
  whole = data.Batches(np.arange(20), 20, shuffle=True, seed=3)[0][0]
  part = data.Batches(np.arange(20), 20, shuffle=True, seed=3, limit=7)[0][0]
  np.testing.assert_array_equal(part, whole[:7])


def test_a_preprocess_may_return_one_array():
  (x,) = data.Batches(np.arange(3), 3, preprocess=lambda x: x + 1)[0]
  np.testing.assert_array_equal(x, [1, 2, 3])


@pytest.mark.parametrize(
  ('make', 'error', 'message'),
  [
    (lambda: data.Batches(np.zeros((0, 3)), 4), ValueError, 'no example'),
    (lambda: data.Batches(Records(0), 4, fields=('x',)), ValueError, 'no exa'),
    (lambda: data.Batches(np.arange(3), 0), ValueError, 'batch_size.*got 0'),
    (lambda: data.Batches(np.arange(3), -2), ValueError, 'batch_size.*got -2'),
    (lambda: data.Batches(np.arange(3), 1.5), ValueError, 'batch_size'),
    (lambda: data.Batches(np.arange(3), 1, limit=0), ValueError, 'limit'),
    (
      lambda: data.Batches((np.arange(3), np.arange(4)), 2),
      ValueError,
      r'same number of examples; got \[3, 4\]',
    ),
    (lambda: data.Batches(np.float32(1), 2), ValueError, 'leading axis'),
    (lambda: data.Batches((), 2), ValueError, 'at least one array'),
    (lambda: data.Batches(iter([1]), 2), TypeError, 'walked only once'),
    (lambda: data.Batches(Records(3), 2), TypeError, 'needs fields'),
    (
      lambda: data.Batches(np.arange(3), 2, fields=('x',)),
      TypeError,
      'no fields',
    ),
  ],
)
def test_refuses(make, error, message):
  with pytest.raises(error, match=message):
    make()


def test_index_out_of_range():
  batches = data.Batches(np.arange(3), 2)
  np.testing.assert_array_equal(batches[-1][0], [2])
  with pytest.raises(IndexError, match='batch 2 of 2'):
    batches[2]
