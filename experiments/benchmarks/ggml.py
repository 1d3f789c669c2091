"""Products of ggml, through the libraries of the wheel of llama-cpp-python.

Weights lie as ggml's own formats do; those that it packs again for its
backends (q4_0 among them) are not packed here.
"""

import ctypes
import os
import pathlib
import weakref
from typing import Any

import numpy as np

TYPES = {'F32': 0, 'Q4_0': 2, 'Q8_0': 8, 'Q4_K': 12, 'TQ2_0': 35}  # ggml.h
OVERHEAD = 2**20  # bytes of headers of tensors and of the graph


class _Init(ctypes.Structure):
  _fields_ = (
    ('mem_size', ctypes.c_size_t),
    ('mem_buffer', ctypes.c_void_p),
    ('no_alloc', ctypes.c_bool),
  )


def load() -> Any:
  """The functions used here.

  Raises:
    ImportError: the wheel is absent, or exports less than is needed.
  """
  import llama_cpp

  folder = pathlib.Path(llama_cpp.__file__).parent / 'lib'
  pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
  signatures: dict[str, dict[str, tuple[Any, list[Any]]]] = {
    'libggml-base.so': {
      'ggml_init': (pointer, [_Init]),
      'ggml_free': (None, [pointer]),
      'ggml_new_tensor_2d': (pointer, [pointer, integer, size, size]),
      'ggml_get_data': (pointer, [pointer]),
      'ggml_nbytes': (ctypes.c_size_t, [pointer]),
      'ggml_row_size': (ctypes.c_size_t, [integer, size]),
      'ggml_quantize_chunk': (
        ctypes.c_size_t,
        [integer, pointer, pointer, size, size, size, pointer],
      ),
      'ggml_mul_mat': (pointer, [pointer, pointer, pointer]),
      'ggml_new_graph': (pointer, [pointer]),
      'ggml_build_forward_expand': (None, [pointer, pointer]),
      'ggml_backend_graph_compute': (integer, [pointer, pointer]),
      'ggml_backend_free': (None, [pointer]),
    },
    'libggml-cpu.so': {
      'ggml_backend_cpu_init': (pointer, []),
      'ggml_backend_cpu_set_n_threads': (None, [pointer, integer]),
    },
  }
  found: dict[str, Any] = {}
  for name, functions in signatures.items():
    try:
      library = ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
      for function, (result, arguments) in functions.items():
        f = getattr(library, function)
        f.restype, f.argtypes = result, arguments
        found[function] = f
    except (OSError, AttributeError) as error:
      raise ImportError(f'ggml of llama-cpp-python: {error}') from error
  return found


class Products:
  """x times `count` random weights, one after the other."""

  def __init__(self, kind: str, k: int, n: int, m: int, count: int, rng: Any):
    self._ggml = g = load()
    code = TYPES[kind]
    self.nbytes = n * g['ggml_row_size'](code, k)
    size = count * (self.nbytes + 4 * n * m + 4096) + 4 * k * m + OVERHEAD
    context = g['ggml_init'](_Init(size, None, False))
    backend = g['ggml_backend_cpu_init']()
    if not context or not backend:
      raise MemoryError(f'ggml could not be set up with {size} bytes')
    weakref.finalize(self, _free, g, context, backend)
    g['ggml_backend_cpu_set_n_threads'](backend, os.cpu_count() or 1)
    values = rng.standard_normal((n, k), np.float32) * np.float32(k**-0.5)
    x = g['ggml_new_tensor_2d'](context, TYPES['F32'], k, m)
    self.x = self._array(x, (m, k))
    self.x[...] = rng.standard_normal((m, k), np.float32)
    graph, first = g['ggml_new_graph'](context), None
    for _ in range(count):
      w = g['ggml_new_tensor_2d'](context, code, k, n)
      data = g['ggml_get_data'](w)
      if first is None:
        pointer = values.ctypes.data_as(ctypes.c_void_p)
        g['ggml_quantize_chunk'](code, pointer, data, 0, n, k, None)
        first = data
      else:
        ctypes.memmove(data, first, self.nbytes)
      y = g['ggml_mul_mat'](context, w, x)
      g['ggml_build_forward_expand'](graph, y)
    self.values, self.y = values, self._array(y, (m, n))
    self._call = backend, graph

  def _array(self, tensor: int, shape: tuple[int, ...]) -> np.ndarray:
    """The memory of a float tensor, which lives as long as this object."""
    data = self._ggml['ggml_get_data'](tensor)
    pointer = ctypes.cast(data, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(pointer, shape)

  def __call__(self) -> None:
    if self._ggml['ggml_backend_graph_compute'](*self._call):
      raise RuntimeError('ggml failed to compute')


def _free(g: Any, context: int, backend: int) -> None:
  g['ggml_backend_free'](backend)
  g['ggml_free'](context)
