"""Ctrl-C that is not lost.

Python drops a KeyboardInterrupt that is raised within a callback of its
garbage collector, of which JAX has one, and what was to stop goes on. So it is
remembered, and loops ask.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_pressed = threading.Event()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """Remembers Ctrl-C for `check`; nothing where others handle it."""
  ours = threading.current_thread() is threading.main_thread()
  if not ours or signal.getsignal(signal.SIGINT) != signal.default_int_handler:
    yield
    return
  signal.signal(signal.SIGINT, _press)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _pressed.clear()


def check() -> None:
  """Raises KeyboardInterrupt where it was pressed and lost."""
  if _pressed.is_set():
    raise KeyboardInterrupt


def _press(signum: int, frame: FrameType | None) -> None:
  _pressed.set()
  signal.default_int_handler(signum, frame)
