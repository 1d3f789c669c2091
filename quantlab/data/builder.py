"""Arrays on disk as a tensorflow-datasets builder, without TensorFlow.

A set is prepared once into ARRAY_RECORD files and read by random access. The
prepared copy lies under a fingerprint of its source: when the source changes,
another copy is made, and the old one is never read in its stead. Preparation
writes beside the final place and renames, so that an interrupted one leaves
nothing that would be taken for whole.
"""

import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from quantlab.data import npz, paths

VERSION = '1.0.0'

# A split: a path of an npz file, or its arrays, all of one leading length.
Split = str | os.PathLike | Mapping[str, np.ndarray]
Read = Callable[[pathlib.Path], Mapping[str, np.ndarray]]


def npz_builder(
  name: str,
  splits: Mapping[str, Split],
  *,
  data_dir: str | os.PathLike | None = None,
  read: Read = npz.load_npz,
):
  """A `tfds.core.GeneratorBasedBuilder` over npz files or arrays.

  Every array becomes a `Tensor` feature, every row an example; the order of the
  rows is kept, so that `split='test[:50%]'` is the first half of the file.

  Args:
    name: of the set: lower case letters, digits and underscores.
    splits: split name -> npz path, or arrays by name.
    data_dir: where prepared sets lie; by default `quantlab.data.cache_dir()`.
    read: reads the arrays of a path; for sets that need rearranging first.

  Returns:
    The builder. `download_and_prepare()` prepares it, `as_data_source(split)`
    reads it; `data_source` below does both.

  Raises:
    FileNotFoundError: a path does not exist.
    ValueError: no split is given. What is wrong inside a split is said when it
      is prepared.
  """
  if not splits:
    raise ValueError(f'The set {name!r} needs at least one split; got none.')
  for split, source in splits.items():
    if isinstance(source, str | os.PathLike) and not os.path.isfile(source):
      raise FileNotFoundError(
        f'The split {split!r} of {name!r}: no file {os.fspath(source)}.'
      )
  root = pathlib.Path(data_dir) if data_dir else paths.cache_dir() / 'tfds'
  # One folder a fingerprint: tfds itself would only look at name and version.
  home = root / fingerprint(splits, read)
  return _builder_class(name, dict(splits), read)(
    data_dir=os.fspath(home), file_format='array_record'
  )


def data_source(
  name: str,
  splits: Mapping[str, Split],
  split: str,
  *,
  data_dir: str | os.PathLike | None = None,
  read: Read = npz.load_npz,
):
  """A prepared split as a random-access source of records.

  Args:
    name: of the set.
    splits: split name -> npz path, or arrays by name.
    split: which one, with tfds' slicing: `'test'`, `'train[:50%]'`.
    data_dir: where prepared sets lie.
    read: reads the arrays of a path.

  Returns:
    A data source (`len`, `[i]` -> dict of arrays), as `Batches` and grain take.

  Raises:
    ValueError: the split is unknown, or its arrays do not make examples.
  """
  known = split.split('[')[0]
  if known not in splits:
    raise ValueError(
      f'The set {name!r} has no split {known!r}; it has: '
      f'{", ".join(sorted(splits))}.'
    )
  builder = prepared(
    lambda: npz_builder(name, splits, data_dir=data_dir, read=read)
  )
  return builder.as_data_source(split=split)


def prepared(make: Callable[[], Any]) -> Any:
  """A builder from `make` whose data is prepared, by us or by another process.

  Raises:
    ValueError: the prepared copy was damaged after it was written.
  """
  builder = make()
  if not builder.data_path.exists():
    try:
      builder.download_and_prepare()
    except OSError:
      # Another process may have renamed its copy first: it is the same one,
      # but this builder has not seen its metadata.
      if not builder.data_path.exists():
        raise
      builder = make()
  if not builder.is_prepared():
    raise ValueError(
      f'The prepared set in {builder.data_path} is damaged (its metadata are '
      'missing). Delete that folder; it is made again from the source.'
    )
  return builder


def fingerprint(splits: Mapping[str, Split], read: Read = npz.load_npz) -> str:
  """Sixteen hex digits of the names and the bytes of all splits."""
  digest = hashlib.sha256(f'{VERSION} {read.__qualname__}'.encode())
  for split, source in splits.items():
    digest.update(f'split {split}'.encode())
    if isinstance(source, Mapping):
      for key, value in source.items():
        array = np.ascontiguousarray(value)
        digest.update(f'{key} {array.dtype.str} {array.shape}'.encode())
        digest.update(array.tobytes())
    else:
      digest.update(pathlib.Path(source).read_bytes())
  return digest.hexdigest()[:16]


def _builder_class(name: str, splits: dict[str, Split], read: Read) -> type:
  """The builder's class; tfds takes a set's name from its class."""
  # A fifth of a second: only those who read sets from disk pay for it.
  import tensorflow_datasets as tfds

  class NpzBuilder(  # type: ignore[call-arg]
    tfds.core.GeneratorBasedBuilder, skip_registration=True
  ):
    """Rows of npz arrays."""

    VERSION = tfds.core.Version(VERSION)
    # Says where checksums of downloads lie; there are none, and finding out
    # imports a package that tfds does not install on this Python.
    code_path = None

    def _info(self):
      arrays = _arrays(name, next(iter(splits)), splits, read)
      features = {
        key: tfds.features.Tensor(shape=a.shape[1:], dtype=a.dtype)
        for key, a in arrays.items()
      }
      return tfds.core.DatasetInfo(
        builder=self,
        description=f'{name}: arrays of npz files',
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,  # keep the rows in order
      )

    def _split_generators(self, dl_manager):
      del dl_manager  # nothing is downloaded
      return {split: self._generate_examples(split) for split in splits}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
      arrays = _arrays(name, split, splits, read)
      for key, feature in self.info.features.items():
        row = arrays.get(key)
        if row is None or row.shape[1:] != feature.shape:
          raise ValueError(
            f'The splits of {name!r} must hold the same arrays with rows of '
            f'the same shape; {key!r} has rows of {feature.shape} in the first '
            f'split, and {None if row is None else row.shape[1:]} in {split!r}.'
          )
      for i in range(len(next(iter(arrays.values())))):
        yield i, {key: value[i] for key, value in arrays.items()}

    # What tfds prints speaks of downloads, and there are none.
    def _log_download_bytes(self):
      pass

    def _log_download_done(self):
      pass

  NpzBuilder.name = name
  return NpzBuilder


def _arrays(
  name: str, split: str, splits: Mapping[str, Split], read: Read
) -> Mapping[str, np.ndarray]:
  """The arrays of a split, checked to make up examples."""
  source = splits[split]
  if not isinstance(source, Mapping):
    source = read(pathlib.Path(source))
  lengths = {key: len(value) for key, value in source.items()}
  if len(set(lengths.values())) != 1 or not all(lengths.values()):
    raise ValueError(
      f'The split {split!r} of {name!r} needs arrays of one leading length, '
      f'at least 1; got {lengths}.'
    )
  return source
