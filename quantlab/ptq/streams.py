"""Activations of all calibration batches, in memory or on disk.

A stream holds, for every batch, what flows from one block into the next.
Beyond a limit its batches lie in files: the walk's memory does not grow with
the calibration set.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

Arrays = tuple[Any, ...]


class Store:
  """Where streams lie: in memory up to a limit, then in a folder.

  Args:
    folder: for the files; None keeps everything in memory.
    limit: bytes that stay in memory, of all streams together.
  """

  def __init__(self, folder: epath.PathLike | None, limit: int):
    self.folder = None if folder is None else epath.Path(folder)
    self.limit = limit
    self.held = 0
    self._names = itertools.count()

  def stream(self) -> Stream:
    """A new stream without batches."""
    return Stream(self)

  def path(self) -> epath.Path:
    assert self.folder is not None
    return self.folder / f'{next(self._names):06d}.bin'


class Stream:
  """A list of batches, each a tuple of arrays."""

  def __init__(self, store: Store):
    self._store = store
    self._batches: list[list[Any]] = []

  def __len__(self) -> int:
    return len(self._batches)

  def __getitem__(self, index: int) -> Arrays:
    return tuple(_read(x) for x in self._batches[index])

  def __setitem__(self, index: int, arrays: Arrays) -> None:
    self._drop(index)
    self._batches[index] = self._kept(arrays)

  def __iter__(self) -> Iterator[Arrays]:
    for i in range(len(self)):
      yield self[i]

  def append(self, arrays: Arrays) -> None:
    self._batches.append(self._kept(arrays))

  def clear(self) -> None:
    """Forgets all batches and removes their files."""
    for i in range(len(self)):
      self._drop(i)
    self._batches = []

  def _kept(self, arrays: Arrays) -> list[Any]:
    store = self._store
    # Else all batches would be under way at once, with all they need.
    jax.block_until_ready(arrays)
    kept = []
    for x in arrays:
      # An array spread over processes cannot be written by one of them.
      whole = getattr(x, 'is_fully_addressable', True)
      if store.folder is None or not whole:
        kept.append(x)
      elif store.held + x.nbytes <= store.limit:
        store.held += x.nbytes
        kept.append(x)
      else:
        kept.append(_Spilled.write(store.path(), x))
    return kept

  def _drop(self, index: int) -> None:
    for x in self._batches[index]:
      if isinstance(x, _Spilled):
        x.path.unlink(missing_ok=True)
      elif self._store.folder is not None:
        self._store.held -= x.nbytes
    self._batches[index] = []


class _Spilled:
  """An array in a file of its bytes; what they mean stays in memory."""

  def __init__(self, path: epath.Path, x: Any):
    self.path, self.shape, self.dtype = path, x.shape, x.dtype
    # An uncommitted array must not come back bound to the default device.
    bound = getattr(x, 'committed', False)
    self.sharding = x.sharding if bound else None

  @classmethod
  def write(cls, path: epath.Path, x: Any) -> _Spilled:
    """Writes the bytes of x.

    Raises:
      OSError: the disk is full or cannot be written, with what to do.
    """
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(np.ascontiguousarray(x).tobytes())
    except OSError as error:
      path.unlink(missing_ok=True)
      raise OSError(
        error.errno,
        f'cannot write {x.nbytes:,} bytes of activations to '
        f'{os.fspath(path.parent)!r} ({error.strerror}); give ptq(...) a '
        'workdir on a disk with room, or a larger memory=. What was '
        'checkpointed is whole: the same call goes on from there',
      ) from error
    return cls(path, x)

  def read(self) -> Any:
    x = np.frombuffer(self.path.read_bytes(), self.dtype).reshape(self.shape)
    return jax.device_put(x, self.sharding)


def _read(x: Any) -> Any:
  return x.read() if isinstance(x, _Spilled) else x
