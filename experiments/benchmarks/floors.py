"""What the machine can do at most: memory read, int8 operations."""

import ctypes
import os
import pathlib
import re
import subprocess
import tempfile
from typing import Any

import numpy as np

from experiments.benchmarks import timing
from quantlab_kernels.cpu import build
from quantlab_kernels.cpu import library as cpu

ROUNDS = 9


def _compiled() -> ctypes.CDLL:
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'floors.so')
    source = os.fspath(pathlib.Path(__file__).with_suffix('.cc'))
    command = [build.compiler()[0], *build.FLAGS, '-shared', '-o', path, source]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(path)
  library.read_rate.restype = library.int8_rate.restype = ctypes.c_double
  library.read_rate.argtypes = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
  library.int8_rate.argtypes = ctypes.c_int, ctypes.c_int
  return library


class Memory:
  """Bytes past the caches, to be read by one thread a core."""

  def __init__(self, nbytes: int):
    self._library = _compiled()
    self._data = np.ones(nbytes, np.uint8)

  def read(self) -> float:
    """Reads all of it; returns bytes per second."""
    data = self._data
    return self._library.read_rate(data.ctypes.data, data.nbytes, _threads())

  def measure(self) -> dict[str, Any]:
    """Bytes and operations per second.

    Returns:
      The best rounds (a floor is what could be reached), and the spread.
    """
    read = [self.read() for _ in range(ROUNDS)]
    matrix = 'amx' in cpu.isas()
    dots = [self._library.int8_rate(_threads(), matrix) for _ in range(3)]
    return {
      'bytes_per_second': max(read),
      'int8_operations_per_second': max(dots),
      'read': timing.spread(read),
      'int8': timing.spread(dots),
      'processor': _processor(),
      'instructions': cpu.isas()[0],
      'rotated': self._data.nbytes,
      'threads': _threads(),
    }


def _processor() -> str:
  found = re.search(
    r'^model name\s*: (.*)$', pathlib.Path('/proc/cpuinfo').read_text(), re.M
  )
  return found[1] if found else ''


def _threads() -> int:
  return os.cpu_count() or 1
