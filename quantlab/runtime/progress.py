"""One progress display for long work: rate, and time left.

Nested loops share one display. It is silent where nobody looks: when the
output is not a terminal, and on every process but the first.
"""

import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

import jax
from rich import console as rich_console
from rich import progress as rich_progress
from rich import text as rich_text

from quantlab.runtime import interrupt

T = TypeVar('T')


class _Rate(rich_progress.ProgressColumn):
  """Steps a second, or seconds a step when they are slow."""

  def render(self, task: rich_progress.Task) -> rich_text.Text:
    speed = task.finished_speed or task.speed
    if not speed:
      return rich_text.Text('')
    rate = f'{speed:.1f}/s' if speed >= 1 else f'{1 / speed:.1f} s each'
    return rich_text.Text(rate, style='progress.data.speed')


class _Display:
  """The display of the loops now running, made for the outermost one."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._users = 0
    self._progress: rich_progress.Progress | None = None

  @contextlib.contextmanager
  def use(self, force: bool) -> Iterator[rich_progress.Progress | None]:
    """The shared display, or None where it would not be seen."""
    if not force and not is_visible():
      yield None
      return
    with self._lock:
      self._users += 1
      if self._progress is None:
        self._progress = _make()
        self._progress.start()
      progress = self._progress
    try:
      yield progress
    finally:
      with self._lock:
        self._users -= 1
        if self._users == 0:
          progress.stop()
          self._progress = None


_display = _Display()


def is_visible() -> bool:
  """Whether a progress display would be seen by a person."""
  return sys.stderr.isatty() and jax.process_index() == 0


def track(
  items: Iterable[T],
  label: str,
  total: int | None = None,
  *,
  force: bool = False,
) -> Iterator[T]:
  """Yields the items while a bar shows how many, how fast and how long yet.

  Args:
    items: what to loop over.
    label: what is being done, e.g. 'calibrate'.
    total: how many there are, when `len(items)` does not say.
    force: show it even where it would not be seen (for tests).

  Yields:
    The items.
  """
  if total is None and isinstance(items, Sized):
    total = len(items)
  with _display.use(force) as progress:
    if progress is None:
      for item in items:
        interrupt.check()
        yield item
      return
    task = progress.add_task(label, total=total)
    try:
      for item in items:
        interrupt.check()
        yield item
        progress.advance(task)
    finally:
      progress.remove_task(task)


def _make() -> rich_progress.Progress:
  return rich_progress.Progress(
    rich_progress.TextColumn('{task.description}'),
    rich_progress.BarColumn(),
    rich_progress.MofNCompleteColumn(),
    _Rate(),
    rich_progress.TimeRemainingColumn(),
    console=rich_console.Console(file=sys.stderr),
    transient=True,
  )
