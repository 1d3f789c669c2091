"""Loads the compiled kernels, or says why they cannot run.

Environment: QUANTLAB_CPU_FFI, `auto` (the xla backend serves where the kernels
cannot be built, after one warning), `0` (never), `require` (an error where
they cannot be built); QUANTLAB_CPU_ISA, the instruction set to use, one of
`amx`, `avx512vnni`, `avxvnni`, `avx2`, or `none`; QUANTLAB_LARGE_PAGES=0, to
leave weights in the pages they are in.
"""

import ctypes
import functools
import os
import threading
import warnings

import jax

from quantlab_kernels.cpu import build

MULTIPLY = 'quantlab_multiply'
MULTIPLY_FLOATS = 'quantlab_multiply_floats'
QUANTIZE = 'quantlab_quantize'
CONVOLVE = 'quantlab_convolve'
# Preferred first; bits of `quantlab_isas`.
ISAS = {'amx': 8, 'avx512vnni': 4, 'avxvnni': 2, 'avx2': 1}

_LOCK = threading.Lock()


def unavailable() -> str | None:
  """Returns why the kernels cannot run here, or None; builds them if need be.

  Raises:
    RuntimeError: if they are required and cannot be built.
  """
  mode = os.environ.get('QUANTLAB_CPU_FFI', 'auto')
  if mode not in ('auto', '0', 'require'):
    raise ValueError(
      f'QUANTLAB_CPU_FFI={mode!r}, expected auto, 0 (never) or require'
    )
  if mode == '0':
    return 'switched off by QUANTLAB_CPU_FFI=0'
  why = build.supported() or _failure() or _no_isa()
  if why and mode == 'require':
    raise RuntimeError(f'QUANTLAB_CPU_FFI=require, but {why}')
  return why


def isa() -> str:
  """Returns the instruction set in use (where `unavailable` is None)."""
  named = os.environ.get('QUANTLAB_CPU_ISA')
  if not named:
    return isas()[0]
  return named


def isas() -> tuple[str, ...]:
  """Returns the instruction sets of this machine, preferred first."""
  return tuple(n for n, bit in ISAS.items() if _isas() & bit)


def _no_isa() -> str | None:
  named = os.environ.get('QUANTLAB_CPU_ISA')
  if named == 'none' or not (named or _isas()):
    return 'the processor has neither AVX2 nor AVX512-VNNI'
  if named and named not in ISAS:
    raise ValueError(
      f'QUANTLAB_CPU_ISA={named!r}, expected one of {(*ISAS, "none")}'
    )
  if named and not _isas() & ISAS[named]:
    return f'QUANTLAB_CPU_ISA={named}, which the processor lacks'
  return None


def _isas() -> int:
  loaded = _load()
  return 0 if isinstance(loaded, str) else loaded.quantlab_isas()


def _failure() -> str | None:
  loaded = _load()
  return loaded if isinstance(loaded, str) else None


def _load() -> ctypes.CDLL | str:
  with _LOCK:  # two threads that trace at once
    return _load_once()


@functools.cache
def _load_once() -> ctypes.CDLL | str:
  """Returns the library with its targets registered, or why there is none."""
  try:
    path = build.build()
    try:
      loaded = ctypes.CDLL(str(path))
    except OSError:  # intact, yet not for this system: once more, from scratch
      build.discard(path)
      loaded = ctypes.CDLL(str(build.build()))
  except (build.BuildError, OSError) as error:
    why = f'the kernels could not be built: {error}'
    warnings.warn(
      f'quantlab: {why}\nProducts of low-bit codes run on plain XLA, several '
      'times slower. QUANTLAB_CPU_FFI=0 silences this.',
      stacklevel=2,
    )
    return why
  loaded.quantlab_isas.restype = ctypes.c_int64
  for name in (MULTIPLY, MULTIPLY_FLOATS, QUANTIZE, CONVOLVE):
    handler = jax.ffi.pycapsule(getattr(loaded, name))
    jax.ffi.register_ffi_target(name, handler, platform='cpu')
  return loaded
