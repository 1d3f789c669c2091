"""Where studies are kept: a journal on a shared file system, or a database."""

from __future__ import annotations

import os
import pathlib
import warnings
from typing import Any

import optuna
from absl import logging
from optuna.storages import journal

# Seconds: how often a worker of a database says that it lives, and after what
# silence its trial is another's.
HEARTBEAT, GRACE = 20, 60


def check(storage: Any) -> None:
  """Refuses what is no path and no URL.

  Raises:
    TypeError: what was found.
  """
  if not isinstance(storage, str | os.PathLike) or not os.fspath(storage):
    raise TypeError(
      f'storage={storage!r}: expected the path of a journal file, or the URL '
      'of a database'
    )


def reach(storage: str | os.PathLike) -> Any:
  """Opens a storage: before any work, so that failing costs none.

  Args:
    storage: a path (a journal file), or a URL of a database.

  Returns:
    The storage, as Optuna takes it.

  Raises:
    ValueError: it cannot be reached, or holds something else.
    TypeError: it is no path and no URL.
  """
  check(storage)
  if not _is_url(storage):
    locks(storage)
  try:
    return _open(storage)
  except ValueError as error:
    raise ValueError(
      f'the storage {os.fspath(storage)!r} cannot be opened: {_line(error)}. '
      'Give a path or a URL where there is nothing yet, or a study'
    ) from error
  except Exception as error:  # of the driver of any database
    raise unreachable(storage, error) from error


def exists(storage: str | os.PathLike) -> bool:
  """Whether there may be something to read; of a database only it can say."""
  path = os.fspath(storage)
  if path.startswith('sqlite:///'):  # which makes an empty file where none is
    path = path.removeprefix('sqlite:///')
  return _is_url(path) or pathlib.Path(path).is_file()


def unreachable(storage: str | os.PathLike, error: Exception) -> ValueError:
  """What to raise where a storage fails; one line of what drivers say."""
  return ValueError(
    f'the storage {os.fspath(storage)!r} cannot be reached '
    f'({type(error).__name__}: {_line(error)}). Give a path that this user may '
    'write to, or the URL of a database that runs'
  )


def locks(storage: str | os.PathLike) -> pathlib.Path | None:
  """The folder of the workers' locks beside a journal; of a database none.

  Raises:
    ValueError: it cannot be made.
  """
  if _is_url(storage):
    return None
  path = pathlib.Path(storage)
  folder = path.with_name(path.name + '.workers')
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise unreachable(storage, error) from error
  return folder


def _is_url(storage: str | os.PathLike) -> bool:
  return '://' in os.fspath(storage)


def _line(error: Exception) -> str:
  """The first line; drivers append statements and addresses of manuals."""
  return (str(error).strip().splitlines() or ['no reason was given'])[0]


class _Journal(journal.JournalFileBackend):
  """A journal that outlives a writer that died within a line.

  Optuna reads past a last line without an end, and would write on in it: what
  comes after could never be read again.
  """

  def __init__(self, path: str):
    self._path, self._own = path, journal.JournalFileSymlinkLock(path)
    super().__init__(path, self._own)

  def append_logs(self, logs: list[dict[str, Any]]) -> None:
    self._cut()
    super().append_logs(logs)

  def _cut(self) -> None:
    """Removes a last line without an end."""
    self._own.acquire()
    try:
      with open(self._path, 'r+b') as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        if file.read(1) in (b'', b'\n'):
          return
        file.seek(0)
        kept = file.read().rfind(b'\n') + 1
        file.truncate(kept)
    finally:
      self._own.release()
    logging.warning(
      '%s ended within a line: %d bytes that no worker has read were removed',
      *(self._path, size - kept),
    )


def _open(storage: str | os.PathLike) -> Any:
  if not _is_url(storage):
    return optuna.storages.JournalStorage(_Journal(os.fspath(storage)))
  with warnings.catch_warnings():
    # Optuna says of its own heartbeat that it may change.
    warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
    return optuna.storages.RDBStorage(
      os.fspath(storage),
      heartbeat_interval=HEARTBEAT,
      grace_period=GRACE,
      heartbeat_stale_trial_callback=(
        optuna.storages.RetryHeartbeatStaleTrialCallback()
      ),
    )
