"""The folder of one run: owned, locked, resumable."""

import os
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from quantlab.runtime import checkpoint, files, manifest, metrics

try:
  import fcntl
except ImportError:  # not a POSIX system: a second run is not noticed
  fcntl = None  # type: ignore[assignment]


class WorkdirError(ValueError):
  """A folder that this run may not use, with the reason and the cure."""


class Workdir:
  """What a run leaves behind, and what it finds when started again.

  Opening writes `config.json` and `manifest.json` before any work starts, or
  refuses: a folder that cannot be written, that holds something else, that
  belongs to a run of another config, or that another process writes now. A
  folder of the same config is resumed: `metrics` tells what is finished.

  Use as a context manager. Only process 0 writes.

  Attributes:
    path: the folder.
    metrics: its `Metrics`.
    resumed: whether a run of the same config was here before.
  """

  def __init__(
    self,
    path: epath.PathLike,
    config: Mapping[str, Any],
    *,
    seed: int | None = None,
  ):
    self.path = epath.Path(path)
    self._config = files.to_jsonable(config)
    self._lock: int | None = None
    self._writes = jax.process_index() == 0
    try:
      if self._writes:
        make_writable(self.path)
        self._lock = _lock(self.path)
        self.resumed = check_owner(self.path, config)
        self._sign(seed)
      checkpoint.barrier(f'signed {self.path}')
      if not self._writes:  # what the first process has just signed
        self.resumed = check_owner(self.path, config)
      self.metrics = metrics.Metrics(self.path)
    except BaseException:
      self._unlock()
      raise

  def __enter__(self) -> 'Workdir':
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()

  def close(self) -> None:
    """Flushes what is open and lets another run in."""
    self.metrics.close()
    self._unlock()

  def write_json(self, name: str, value: Any) -> None:
    """Writes `name` (a path below the folder) in one step."""
    if self._writes:
      files.write_json(self.path / name, value)

  def write_text(self, name: str, text: str) -> None:
    """The same for a text."""
    if self._writes:
      files.write_text(self.path / name, text)

  def write_bytes(self, name: str, data: bytes) -> None:
    """The same for a picture."""
    if self._writes:
      files.write_bytes(self.path / name, data)

  def read_json(self, name: str, default: Any = None) -> Any:
    """Reads it back; `default` when it is absent."""
    path = self.path / name
    return files.read_json(path) if path.exists() else default

  def update_json(self, name: str, key: str, value: Any) -> None:
    """Sets one key of a JSON object."""
    self.write_json(name, self.read_json(name, {}) | {key: value})

  def _sign(self, seed: int | None) -> None:
    """Writes who made this: the config, and the manifest of every session."""
    if not self.resumed:
      files.write_json(self.path / 'config.json', self._config)
    now = manifest.manifest({'config': self._config}, seed)
    first = self.read_json('manifest.json')
    if first is None:
      files.write_json(self.path / 'manifest.json', now | {'resumed_by': []})
      return
    # Results made by other versions are kept, and said to be so.
    known = [first, *first['resumed_by']]
    if not any(_same(now, session) for session in known):
      first['resumed_by'].append(now)
      files.write_json(self.path / 'manifest.json', first)

  def _unlock(self) -> None:
    if self._lock is not None:
      os.close(self._lock)  # closing releases the lock, as would dying
      self._lock = None


def check_owner(path: epath.PathLike, config: Mapping[str, Any]) -> bool:
  """Whether a folder holds an earlier run of this config.

  Raises:
    WorkdirError: it holds something else, or the run of another config.
  """
  folder = epath.Path(path)
  file = folder / 'config.json'
  if not file.exists():
    others = [p.name for p in folder.iterdir() if p.name[0] != '.']
    if others:
      raise WorkdirError(
        f'{os.fspath(folder)!r} holds {sorted(others)[:3]} but no '
        'config.json: it is not a workdir. Give an empty or a new folder.'
      )
    return False
  lines = manifest.differences(files.read_json(file), files.to_jsonable(config))
  if lines:
    shown = '\n  '.join(lines[:10] + ['...'] * (len(lines) > 10))
    raise WorkdirError(
      f'{os.fspath(folder)!r} belongs to a run of another config:\n'
      f'  {shown}\nGive another --workdir, or the config it was made with.'
    )
  return True


def _same(now: Mapping[str, Any], session: Mapping[str, Any]) -> bool:
  return all(files.to_jsonable(v) == session.get(k) for k, v in now.items())


def make_writable(path: epath.Path) -> None:
  """Makes the folder and tries a write, so that failing costs no work."""
  probe = path / f'.probe.{os.getpid()}'
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe.write_text('')
    probe.unlink()
  except OSError as e:
    raise WorkdirError(
      f'cannot write to the folder {os.fspath(path)!r}: '
      f'{e.strerror or e}. Give a --workdir that this user may write to.'
    ) from None


def _lock(path: epath.Path) -> int | None:
  """Takes the folder for this process; the lock ends with the process."""
  if fcntl is None or not files.is_local(path):
    return None
  lock = os.open(path / '.lock', os.O_RDWR | os.O_CREAT, 0o644)
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    os.close(lock)
    raise WorkdirError(
      f'another process is writing to {os.fspath(path)!r}. Wait for it to '
      'end, or give another --workdir.'
    ) from None
  except OSError:  # a file system without locks
    pass
  return lock
