"""Files and folders that are either whole or absent.

Everything a run leaves behind goes through here: content is written beside its
destination, flushed to the disk and renamed into place, so that a reader never
meets half a file, whenever the writer was stopped.
"""

import collections.abc
import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath


def is_local(path: epath.PathLike) -> bool:
  """Whether `path` is on a mounted file system (no 'gs://' or the like)."""
  return '://' not in os.fspath(path)


def write_bytes(path: epath.PathLike, data: bytes) -> None:
  """Writes a file in one step: a reader sees the old content or all of `data`.

  Args:
    path: the file; its folder is made when absent.
    data: the whole content.
  """
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if not is_local(path):  # object stores publish an object only when complete
    path.write_bytes(data)
    return
  partial = path.parent / f'.{path.name}.{os.getpid()}.tmp'
  try:
    with open(partial, 'wb') as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)
  _sync_folder(path.parent)


def write_text(path: epath.PathLike, text: str) -> None:
  """`write_bytes` of a text in UTF-8."""
  write_bytes(path, text.encode('utf-8'))


def write_json(path: epath.PathLike, value: Any) -> None:
  """`write_bytes` of a value as indented JSON with sorted keys."""
  write_text(path, dumps(value) + '\n')


def read_json(path: epath.PathLike) -> Any:
  """Parses a JSON file; a ValueError names the file when it is not JSON."""
  try:
    return json.loads(epath.Path(path).read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as e:
    raise ValueError(
      f'{os.fspath(path)!r} is not a JSON file ({e}): it was truncated or '
      'edited. Remove it, or restore it from a copy.'
    ) from None


def dumps(value: Any, indent: int | None = 2) -> str:
  """JSON text with sorted keys, strict: NaN and infinities become strings.

  Strings, because strict JSON has no such numbers, and `float('inf')` reads
  them back.
  """
  return json.dumps(
    to_jsonable(value), indent=indent, sort_keys=True, allow_nan=False
  )


def to_jsonable(value: Any) -> Any:
  """Plain Python for JSON: NumPy and JAX scalars and arrays are unwrapped.

  Raises:
    TypeError: when a value has no JSON form.
  """
  if value is None or isinstance(value, (bool, str, int)):
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else str(value)
  if isinstance(value, collections.abc.Mapping):
    return {str(k): to_jsonable(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [to_jsonable(v) for v in value]
  if hasattr(value, 'dtype') and hasattr(value, 'shape'):
    return to_jsonable(np.asarray(value).tolist())
  raise TypeError(
    f'no JSON form for {value!r} of type {type(value).__name__}; expected '
    'None, a bool, number, string, array, list, tuple or mapping of those.'
  )


def fingerprint(value: Any) -> str:
  """Sixteen hex digits of the SHA-256 of a value's canonical JSON."""
  return hashlib.sha256(dumps(value, indent=None).encode()).hexdigest()[:16]


def hash_file(path: epath.PathLike) -> str:
  """SHA-256 of a file's bytes, read in pieces."""
  digest = hashlib.sha256()
  with epath.Path(path).open('rb') as f:
    while piece := f.read(1 << 20):
      digest.update(piece)
  return digest.hexdigest()


@contextlib.contextmanager
def new_folder(
  path: epath.PathLike, overwrite: bool = False
) -> Iterator[epath.Path]:
  """Fills a folder beside `path` and gives it that name when complete.

  Args:
    path: the folder to make.
    overwrite: replace a folder of that name instead of refusing.

  Yields:
    The folder to fill. It disappears when the body raises.
  """
  path = epath.Path(path)
  if path.exists() and not overwrite:
    raise FileExistsError(
      f'{os.fspath(path)!r} exists already; give another name, or '
      'overwrite=True to replace it.'
    )
  partial = partial_name(path)
  remove(partial)
  partial.mkdir(parents=True)
  try:
    yield partial
    _sync_files(partial)
    remove(path)
    partial.rename(path)
  finally:
    remove(partial)
  _sync_folder(path.parent)


def partial_name(path: epath.PathLike) -> epath.Path:
  """Where `new_folder` fills a folder.

  One fixed name: what a killed writer left is found and removed by the next,
  and several processes agree on it.
  """
  path = epath.Path(path)
  return path.parent / f'.{path.name}.partial'


def remove(path: epath.PathLike) -> None:
  """Removes a file or a folder with all it holds; nothing when absent."""
  path = epath.Path(path)
  if path.is_dir():
    shutil.rmtree(path) if is_local(path) else path.rmtree()
  else:
    path.unlink(missing_ok=True)


def _sync_files(folder: epath.Path) -> None:
  """Flushes every file below `folder` to the disk."""
  if not is_local(folder):
    return
  for root, _, names in os.walk(folder):
    for name in names:
      with open(os.path.join(root, name), 'rb') as f:
        os.fsync(f.fileno())
    _sync_folder(epath.Path(root))


def _sync_folder(folder: epath.Path) -> None:
  """Makes renames inside a folder durable (POSIX asks for it)."""
  if not is_local(folder) or os.name != 'posix':
    return
  fd = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(fd)
  finally:
    os.close(fd)
