"""Arrays in npz files, read without pickle."""

import os
import pathlib
import zipfile

import numpy as np


def load_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """All arrays of a pickle-free npz file, in the order they were stored.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the file is truncated, is no npz, or holds pickled objects.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f'{path}: no such npz file.')
  try:
    stored = np.load(path, allow_pickle=False)
    if isinstance(stored, np.ndarray):
      raise ValueError('a single array, not an archive of named arrays')
    with stored:
      return {name: stored[name] for name in stored.files}
  except (ValueError, EOFError, zipfile.BadZipFile) as error:
    raise ValueError(
      f'{path} cannot be read: {error}. Expected an npz archive of plain '
      'arrays (numpy.savez); pickled objects are refused.'
    ) from error
