"""What a stretch of work cost: seconds and memory."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator

import jax


@dataclasses.dataclass
class Timer:
  """Seconds of a `timed()` block, set when the block ends."""

  seconds: float = 0.0


@contextlib.contextmanager
def timed() -> Iterator[Timer]:
  """Measures wall-clock seconds.

  Use as `with timed() as t: ...`, then `t.seconds`. The caller blocks on
  its arrays: dispatch alone is not work done.
  """
  timer, start = Timer(), time.perf_counter()
  try:
    yield timer
  finally:
    timer.seconds = time.perf_counter() - start


def peak_bytes() -> int | None:
  """Peak memory of this process so far, in bytes.

  The device's own count where it keeps one (GPU, TPU), else the peak
  resident size of the process, else None.
  """
  stats = jax.local_devices()[0].memory_stats()
  if stats and 'peak_bytes_in_use' in stats:
    return int(stats['peak_bytes_in_use'])
  try:
    import resource
  except ImportError:  # not a POSIX system
    return None
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak if sys.platform == 'darwin' else 1024 * peak
