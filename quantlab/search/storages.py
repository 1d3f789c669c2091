"""Where studies are kept: a journal on a shared file system, or a database."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import urllib.parse
import warnings
from collections.abc import Generator, Iterator
from typing import Any

import optuna
import sqlalchemy
from absl import logging
from optuna.exceptions import StorageInternalError
from optuna.storages import journal

# Seconds: how often a worker of a database says that it lives, after what
# silence its trial is another's, and how long a locked SQLite file is waited
# for.
HEARTBEAT, GRACE, PATIENCE = 20, 60, 20
# How the journal of a study begins, when it was cut within its first line.
_BEGINS = b'{"op_code":0,"worker_id":"'


class Broken(BaseException):
  """A storage failed within a trial.

  No `Exception`, of which Optuna would record that the trial failed: it is
  left running, so that it is measured again.
  """


def check(storage: Any, name: str = 'storage') -> None:
  """Refuses what is no path and no URL.

  Raises:
    TypeError: what was found, by the name of the argument.
  """
  if not isinstance(storage, str | os.PathLike) or not os.fspath(storage):
    raise TypeError(
      f'{name}={storage!r}: expected the path of a journal file, or the URL '
      'of a database'
    )


def check_source(source: Any, storage: str | os.PathLike) -> None:
  """Refuses to learn from the study itself.

  Raises:
    TypeError: the source is no path and no URL.
    ValueError: it is the storage, under whatever name.
  """
  check(source, 'source')
  if _place(source) == _place(storage):
    raise ValueError(
      f'source={shown(source)!r} is the storage of this study itself: expected '
      'that of another one, which was finished before'
    )


def shown(storage: str | os.PathLike) -> str:
  """A storage for messages: a URL without its password."""
  text = os.fspath(storage)
  if not _is_url(text):
    return text
  text = re.sub(r'(://[^:/@]*):.*@', r'\1:***@', text)
  return re.sub(r'([?&](?:password|passwd|pwd)=)[^&]*', r'\1***', text)


def reach(storage: str | os.PathLike) -> Any:
  """Opens a storage: before any work, so that failing costs none.

  Args:
    storage: a path (a journal file), or a URL of a database.

  Returns:
    The storage, as Optuna takes it.

  Raises:
    ValueError: it cannot be reached, or holds something else, which is left as
      it is.
    TypeError: it is no path and no URL.
  """
  check(storage)
  try:
    if not _is_url(storage):
      _check_journal(storage)
      locks(storage)
    return _open(storage)
  except ValueError as error:
    raise ValueError(
      f'the storage {shown(storage)!r} cannot be opened: '
      f'{_line(error, storage)}. Give a path or a URL where there is nothing '
      'yet, or a study'
    ) from error
  except Exception as error:  # of the driver of any database
    raise unreachable(storage, error) from error


def read(storage: str | os.PathLike) -> Any:
  """Opens a storage to read: nothing is written to it or beside it.

  Raises:
    ValueError: it cannot be read, or holds no study.
    TypeError: it is no path and no URL.
  """
  check(storage)
  try:
    if not exists(storage):
      raise FileNotFoundError('it is not there')
    if _is_url(storage):
      return optuna.storages.RDBStorage(
        _read_only(os.fspath(storage)), skip_table_creation=True
      )
    _check_journal(storage)
    return optuna.storages.JournalStorage(_Journal(os.fspath(storage), False))
  except Exception as error:  # of the driver of any database
    raise ValueError(
      f'the storage {shown(storage)!r} cannot be read: '
      f'{_line(_reason(error), storage)}. Expected a study that this user may '
      'read'
    ) from error


def exists(storage: str | os.PathLike) -> bool:
  """Whether there may be something to read; of a server only it can say."""
  path = os.fspath(storage)
  if path.startswith('sqlite'):  # which makes an empty file where none is
    path = _sqlite_file(path) or path
  return _is_url(path) or pathlib.Path(path).is_file()


def unreachable(storage: str | os.PathLike, error: Exception) -> ValueError:
  """What to raise where a storage fails; one line of what drivers say."""
  error = _reason(error)
  return ValueError(
    f'the storage {shown(storage)!r} cannot be reached '
    f'({type(error).__name__}: {_line(error, storage)}). Give a path that this '
    'user may write to, or the URL of a database that runs'
  )


@contextlib.contextmanager
def guarded(storage: str | os.PathLike) -> Iterator[None]:
  """Says in one line that a storage failed in the midst of work.

  Raises:
    ValueError: names the storage, its driver's reason, and how to go on.
  """
  try:
    yield
  except (Exception, Broken) as error:
    found = _failure(error)
    if found is None:
      raise
    reason = _reason(found)
    raise ValueError(
      f'the storage {shown(storage)!r} failed ({type(reason).__name__}: '
      f'{_line(reason, storage)}). What was finished is kept: started again '
      'when the storage is well, the study goes on from there'
    ) from error


def _failure(error: BaseException | None) -> Exception | None:
  """The failure of a storage that an exception is of, or None."""
  if isinstance(error, Broken):
    error = error.__cause__
  # Optuna's own slips, where it cannot write what became of a trial: it can
  # read that it still runs, or not even that.
  if isinstance(error, AssertionError | UnboundLocalError):
    error = error.__context__
  kinds = (StorageInternalError, sqlalchemy.exc.SQLAlchemyError)
  return error if isinstance(error, kinds) else None


def _reason(error: Exception) -> Exception:
  """What a driver says, in the place of Optuna's words on it."""
  cause = error.__cause__
  if isinstance(error, StorageInternalError) and isinstance(cause, Exception):
    return cause
  return error


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


def _line(error: Exception, storage: str | os.PathLike) -> str:
  """The first line; drivers append statements and addresses of manuals."""
  line = (str(error).strip().splitlines() or ['no reason was given'])[0]
  return line.replace(os.fspath(storage), shown(storage)).rstrip('.')


def _place(storage: str | os.PathLike) -> Any:
  """What two names of one storage have in common."""
  text = os.fspath(storage)
  file = _sqlite_file(text) if text.startswith('sqlite') else text
  if file is not None and not _is_url(file):
    return os.path.realpath(file)
  try:
    url = sqlalchemy.make_url(text)
  except sqlalchemy.exc.ArgumentError:  # which opening it will tell
    return text
  # Neither who asks nor by what driver.
  kind, server = url.get_backend_name(), (url.host, url.port, url.database)
  return kind, *server, *sorted(url.query.items())


def _sqlite_file(url: str) -> str | None:
  """The file of an SQLite URL; None of another URL, or of none in memory."""
  try:
    found = sqlalchemy.make_url(url)
  except sqlalchemy.exc.ArgumentError:
    return None
  name = found.database
  if found.get_backend_name() != 'sqlite' or name in (None, '', ':memory:'):
    return None
  if name.startswith('file:') and found.query.get('uri'):
    return urllib.parse.unquote(name.removeprefix('file:').partition('?')[0])
  return name


def _read_only(url: str) -> str:
  """The same database; a file by an address that SQLite writes nothing to."""
  file = _sqlite_file(url)
  if file is None:
    return url
  made = sqlalchemy.make_url(url).set(
    database='file:' + urllib.parse.quote(os.path.abspath(file))
  )
  made = made.update_query_dict({'mode': 'ro', 'uri': 'true'})
  return made.render_as_string(hide_password=False)


def _check_journal(storage: str | os.PathLike) -> None:
  """Refuses a file that is no journal, which writing would harm.

  Raises:
    ValueError: what it is instead.
    OSError: it cannot be read.
  """
  path = pathlib.Path(storage)
  if path.exists() and not (path.is_file() or path.is_dir()):
    raise ValueError('it is no file')
  try:
    with path.open('rb') as file:
      first = file.readline(1 << 20)
  except FileNotFoundError:
    return
  if first and not _is_journal(first):
    raise ValueError(
      'it is a file that is not empty, and no journal of a study; nothing was '
      'written to it'
    )


def _is_journal(first: bytes) -> bool:
  """Whether a file with this first line is one.

  Of one that was cut within it nothing could be read, but it is a journal.
  """
  if not first.endswith(b'\n'):
    return first.startswith(_BEGINS)
  try:
    found = json.loads(first)
  except ValueError:
    return False
  return isinstance(found, dict) and {'op_code', 'worker_id'} <= set(found)


class _Journal(journal.JournalFileBackend):
  """A journal that outlives a writer that died within a line.

  Optuna reads past a last line without an end, and would write on in it: what
  comes after could never be read again.
  """

  def __init__(self, path: str, writes: bool = True):
    self._path, self._own = path, journal.JournalFileSymlinkLock(path)
    self._writes = writes
    super().__init__(path, self._own)

  def read_logs(
    self, log_number_from: int
  ) -> Generator[dict[str, Any], None, None]:
    try:
      yield from super().read_logs(log_number_from)
    except OSError as error:
      raise StorageInternalError('the journal cannot be read') from error

  def append_logs(self, logs: list[dict[str, Any]]) -> None:
    if not self._writes:
      raise StorageInternalError('the journal was opened to be read')
    try:
      _check_journal(self._path)  # another program may have written since
      self._cut()
      super().append_logs(logs)
    except (OSError, ValueError) as error:
      raise StorageInternalError('the journal cannot be written') from error

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


class _Database(optuna.storages.RDBStorage):
  """A database whose worker lives on when its heartbeat was not written."""

  def record_heartbeat(self, trial_id: int) -> None:
    try:
      super().record_heartbeat(trial_id)
    except StorageInternalError as error:  # the next may be
      logging.warning(
        '%s: a heartbeat was not written (%s)',
        *(shown(self.url), _line(_reason(error), self.url)),
      )


def _open(storage: str | os.PathLike) -> Any:
  if not _is_url(storage):
    return optuna.storages.JournalStorage(_Journal(os.fspath(storage)))
  with warnings.catch_warnings():
    # Optuna says of its own heartbeat that it may change.
    warnings.simplefilter('ignore', optuna.exceptions.ExperimentalWarning)
    return _Database(
      os.fspath(storage),
      engine_kwargs=_patience(os.fspath(storage)),
      heartbeat_interval=HEARTBEAT,
      grace_period=GRACE,
      heartbeat_stale_trial_callback=(
        optuna.storages.RetryHeartbeatStaleTrialCallback()
      ),
    )


def _patience(url: str) -> dict[str, Any]:
  """Other workers lock all of an SQLite file, each for a moment."""
  waits = url.startswith('sqlite') and 'timeout=' not in url
  return {'connect_args': {'timeout': PATIENCE}} if waits else {}
