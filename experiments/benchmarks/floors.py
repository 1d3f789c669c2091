"""What the machine can do at most: memory read, int8 operations."""

import ctypes
import os
import pathlib
import subprocess
import tempfile
from typing import Any

import numpy as np

from experiments.benchmarks import timing
from quantlab_kernels.cpu import build

ROUNDS = 9


def _compiled() -> ctypes.CDLL:
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'floors.so')
    source = os.fspath(pathlib.Path(__file__).with_suffix('.cc'))
    command = [build.compiler()[0], *build.FLAGS, '-shared', '-o', path, source]
    subprocess.run(command, check=True)
    return ctypes.CDLL(path)


def measure(nbytes: int) -> dict[str, Any]:
  """Bytes and operations per second with one thread a core.

  Args:
    nbytes: to read through, as the products rotate through their weights.

  Returns:
    The best rounds (a floor is what could be reached), and the spread.
  """
  library = _compiled()
  library.read_rate.restype = library.int8_rate.restype = ctypes.c_double
  library.read_rate.argtypes = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
  data = np.ones(nbytes, np.uint8)
  threads = os.cpu_count() or 1
  read = [
    library.read_rate(data.ctypes.data, nbytes, threads) for _ in range(ROUNDS)
  ]
  dots = [library.int8_rate(threads) for _ in range(3)]
  return {
    'bytes_per_second': max(read),
    'int8_operations_per_second': max(dots),
    'read': timing.spread(read),
    'int8': timing.spread(dots),
    'rotated': nbytes,
    'threads': threads,
  }
