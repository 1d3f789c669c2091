"""The sets of the shared folder, by name: which file, and how it is arranged.

Each split is prepared by itself, on first use, from one npz file.
"""

import difflib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from quantlab.data import builder, npz, paths

Arrays = dict[str, np.ndarray]


def _read_labelled(path: pathlib.Path) -> Arrays:
  """Images and labels, and nothing else the file may hold."""
  arrays = npz.load_npz(path)
  return {'x': arrays['x'], 'y': arrays['y']}


def _read_pairs(path: pathlib.Path) -> Arrays:
  """Pairs of sentences as one array of ids (n, 2, t), padded with zeros."""
  arrays = npz.load_npz(path)
  sides = [arrays['ids_a'], arrays['ids_b']]
  t = max(ids.shape[1] for ids in sides)
  ids = [np.pad(ids, ((0, 0), (0, t - ids.shape[1]))) for ids in sides]
  length = np.stack([arrays['len_a'], arrays['len_b']], axis=1)
  return {
    'ids': np.stack(ids, axis=1),
    'length': length,
    'score': arrays['score'],
  }


class StoredSet(NamedTuple):
  """Files of a set by split, and the function that reads one."""

  files: Mapping[str, str]
  read: Callable[[pathlib.Path], Arrays] = npz.load_npz


SETS = {
  # x (32, 32, 3) uint8, y () uint8
  'cifar10': StoredSet(
    {
      'test_jpeg': 'cifar10/test_jpeg.npz',
      'train_jpeg': 'cifar10/train_jpeg_5000.npz',
      'train_lossless': 'cifar10/calib_train_lossless.npz',
    },
    _read_labelled,
  ),
  # x (28, 28) uint8, y () uint8
  'mnist': StoredSet(
    {'test': 'mnist/test.npz', 'train': 'mnist/train_10000.npz'},
    _read_labelled,
  ),
  # ids (2, t) uint16, length (2,) int32, score () float32
  'stsb': StoredSet(
    {'dev': 'minilm_sts/stsb_dev.npz', 'train': 'minilm_sts/stsb_train.npz'},
    _read_pairs,
  ),
  # ids (512,) uint16, lens () int32
  'stories': StoredSet({'text': 'stories260k/stories_tokens.npz'}),
}


def load_set(
  name: str, split: str, *, data_dir: str | os.PathLike | None = None
):
  """A split of a set on disk as a random-access source of records.

  Args:
    name: one of `SETS`.
    split: a split of it, with tfds' slicing: `'test'`, `'train[:50%]'`.
    data_dir: where prepared sets lie; by default `quantlab.data.cache_dir()`.

  Returns:
    A tensorflow-datasets data source (`len`, `[i]` -> dict).

  Raises:
    ValueError: an unknown set or split.
    FileNotFoundError: the shared folder, or its file, is absent.
  """
  if name not in SETS:
    close = difflib.get_close_matches(name, SETS, 1)
    hint = f' Did you mean {close[0]!r}?' if close else ''
    raise ValueError(
      f'Unknown set {name!r}; known: {", ".join(sorted(SETS))}.{hint}'
    )
  stored = SETS[name]
  known = split.split('[')[0]
  if known not in stored.files:
    raise ValueError(
      f'The set {name!r} has no split {known!r}; it has: '
      f'{", ".join(sorted(stored.files))}.'
    )
  splits = {known: paths.require(stored.files[known])}
  return builder.data_source(
    name, splits, split, data_dir=data_dir, read=stored.read
  )
