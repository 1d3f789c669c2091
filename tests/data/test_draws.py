"""Training batches: a function of seed and number, in whole or in parts."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab import data
from quantlab.data import text

X = np.arange(23)


def drawn(**options):
  options = {'steps': 12, 'seed': 3} | options
  return data.Draws((X, X * 2), 5, **options)


def same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 30), size=st.integers(1, 8), seed=st.integers(0, 99))
def test_an_epoch_holds_no_example_twice(n, size, seed):
  if size > n:
    return
  each = n // size
  draws = data.Draws(np.arange(n), size, steps=3 * each, seed=seed)
  epochs = [
    np.concatenate([draws[e * each + i][0] for i in range(each)])
    for e in range(3)
  ]
  for rows in epochs:
    assert len(set(rows.tolist())) == each * size
    assert set(rows.tolist()) <= set(range(n))


def test_batches_follow_from_seed_and_number():
  a, b, other = drawn(), drawn(), drawn(seed=4)
  for i in (7, 0, 11):  # in any order
    same(a[i], b[i])
  assert any((a[i][0] != other[i][0]).any() for i in range(12))
  assert (a[0][0] != a[4][0]).any()  # another epoch, another order
  np.testing.assert_array_equal(a[2][1], 2 * a[2][0])


def noise(rng, x, y):
  return x + 100 * rng.randint(0, 9, x.shape), y


@pytest.mark.parametrize('augment', [None, noise])
def test_parts_make_up_the_whole(augment):
  options = {'steps': 6, 'seed': 1, 'augment': augment}
  whole = data.Draws((X, X), 6, **options)
  parts = [data.Draws((X, X), 6, part=(i, 3), **options) for i in range(3)]
  for i in range(6):
    together = [
      np.concatenate(xs) for xs in zip(*(p[i] for p in parts), strict=True)
    ]
    same(together, whole[i])


def test_the_walk_goes_on_where_it_stood():
  draws = drawn(augment=noise)
  walk = data.iterator(draws)
  first = [next(walk) for _ in range(5)]
  state = json.loads(json.dumps(walk.get_state()))
  rest = list(walk)
  assert len(first) + len(rest) == 12
  resumed = data.iterator(draws)
  resumed.set_state(state)
  for a, b in zip(rest, resumed, strict=True):
    same(a, b)
  for i, batch in enumerate(first):
    same(batch, draws[i])


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    ({'batch_size': 24}, 'expected 1 to 23'),
    ({'batch_size': 0}, 'expected 1 to 23'),
    ({'batch_size': 5, 'part': (0, 2)}, 'does not divide over 2 processes'),
  ],
)
def test_sizes_that_do_not_fit_are_refused(options, words):
  with pytest.raises(ValueError, match=words):
    data.Draws(X, steps=1, seed=0, **options)


def test_crops_and_flips():
  """Against shifting and mirroring one image at a time."""
  x = np.random.RandomState(0).randint(1, 255, (64, 6, 5, 3)).astype(np.uint8)
  found, label = data.crop_and_flip(
    np.random.RandomState(7), x, np.arange(64), margin=2
  )
  np.testing.assert_array_equal(label, np.arange(64))
  padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
  seen = set()
  for image, out in zip(padded, found, strict=True):
    made = {
      (i, j, m): image[i : i + 6, j : j + 5][:, :: -1 if m else 1]
      for i in range(5)
      for j in range(5)
      for m in (0, 1)
    }
    hits = [k for k, v in made.items() if (v == out).all()]
    assert hits
    seen |= set(hits)
  assert len(seen) > 30  # of 50: each image has its own draw


# Text -------------------------------------------------------------------------


def test_codes_are_read_back():
  words = 'To be, or\nnot ~ to {be}!'
  assert text.decode(text.encode(words)) == words
  assert text.decode(text.encode('né à\t')) == 'n '
  assert text.encode(words).max() < text.VOCABULARY


def test_windows_are_stretches_and_what_follows_them():
  codes = np.arange(50, dtype=np.uint8)
  rows = text.Windows(codes, 7, stride=3)
  assert len(rows) == 15
  x, y = rows.take(np.array([0, 14]))
  np.testing.assert_array_equal(x, [np.arange(7), 42 + np.arange(7)])
  np.testing.assert_array_equal(y, x + 1)
  assert len(text.Windows(codes, 49)) == 1
  with pytest.raises(ValueError, match='do not fit into a text of 50'):
    text.Windows(codes, 50)


def test_training_and_validation_share_nothing():
  training, held_out = text.split(np.arange(100), 0.2)
  np.testing.assert_array_equal(np.r_[training, held_out], np.arange(100))
  assert len(held_out) == 20
  with pytest.raises(ValueError, match='between 0 and 1'):
    text.split(np.arange(9), 1.0)


def test_texts_by_name(monkeypatch):
  found = text.characters('sources')
  assert len(found) > 500_000
  assert 'import' in text.decode(found[:5000])
  monkeypatch.setenv('QUANTLAB_DATA', '')
  with pytest.raises(FileNotFoundError, match='QUANTLAB_DATA'):
    text.characters.__wrapped__('tinyshakespeare')
  with pytest.raises(ValueError, match='known: tinyshakespeare'):
    text.characters('shakespeare')


def test_the_shared_text():
  if data.shared_dir() is None:
    pytest.skip('no shared data')
  found = text.characters('tinyshakespeare')
  assert text.decode(found[:14]) == 'First Citizen:'
  assert len(found) == 1_003_857 - text_left_out()


def text_left_out():
  raw = data.require('text/tinyshakespeare_first90.txt').read_bytes()
  return sum(not (32 <= c < 127 or c == 10) for c in raw)
