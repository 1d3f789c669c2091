"""Compiles the C++ kernels, once for each machine.

The compiled library is kept in a private folder under a name that is a digest
of all that it depends on: sources, flags, compiler and jaxlib. Next to it lies
the digest of its content, so that a damaged file is seen and built again. Two
processes that need it at once build it once: the second waits for a lock.

Environment: CXX, the compiler; QUANTLAB_CACHE, the folder.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator

import jax

SOURCE = pathlib.Path(__file__).parent / 'source'
FLAGS = ('-O3', '-std=c++17', '-fPIC', '-pthread')

# Each object of the library: its source and the flags of its instruction set.
# Never those of the machine that compiles: a cache folder may be shared.
_AVX2 = ('-mavx2', '-mfma')
_AVX512 = ('-mavx512f', '-mavx512bw', '-mavx512vl', '-mavx512dq')
_VNNI = (*_AVX2, *_AVX512, '-mavx512vnni')
_ISAS = {
  'avx512vnni': _VNNI,
  'avxvnni': (*_AVX2, '-mavxvnni'),
  'avx2': _AVX2,
}
OBJECTS = {
  **{isa: ('kernel.cc', flags) for isa, flags in _ISAS.items()},
  **{f'conv_{isa}': ('conv.cc', flags) for isa, flags in _ISAS.items()},
  'amx': ('kernel.cc', (*_VNNI, '-mamx-tile', '-mamx-int8')),
  'entry': ('entry.cc', ()),
}


class BuildError(RuntimeError):
  """The kernels cannot be compiled here, and why."""


def supported() -> str | None:
  """Returns why the kernels are not for this machine, or None."""
  if platform.machine() not in ('x86_64', 'AMD64'):
    return f'the kernels are for x86-64, this machine is {platform.machine()}'
  if sys.platform != 'linux':
    return f'the kernels are built on Linux, this is {sys.platform}'
  return None


@functools.cache
def compiler() -> tuple[str, str]:
  """Returns the path of the C++ compiler and its version."""
  named = os.environ.get('CXX')
  for name in [named] if named else ['g++', 'clang++']:
    path = shutil.which(name)
    if path is None:
      continue
    done = subprocess.run(
      [path, '--version'], capture_output=True, text=True, check=False
    )
    if done.returncode == 0 and done.stdout:
      return path, done.stdout.splitlines()[0]
  wanted = f'CXX={named}' if named else 'g++ or clang++'
  raise BuildError(
    f'no C++ compiler ({wanted}): install one, or set CXX to its path'
  )


def sources() -> list[pathlib.Path]:
  """Returns the files the library is made of."""
  return sorted(p for p in SOURCE.iterdir() if p.suffix in ('.h', '.cc'))


def key() -> str:
  """Returns the digest of all that the library depends on."""
  digest = hashlib.sha256()
  for path in sources():
    digest.update(path.name.encode() + b'\0' + path.read_bytes() + b'\0')
  for part in (
    *(repr(FLAGS), repr(OBJECTS), platform.machine(), compiler()[1]),
    importlib.metadata.version('jaxlib'),
  ):
    digest.update(part.encode() + b'\0')
  return digest.hexdigest()[:32]


def folder() -> pathlib.Path:
  """Returns the folder of compiled kernels (it need not exist)."""
  own = os.environ.get('QUANTLAB_CACHE')
  if own:
    return pathlib.Path(own).expanduser()
  base = os.environ.get('XDG_CACHE_HOME')
  return pathlib.Path(base or '~/.cache').expanduser() / 'quantlab'


def build() -> pathlib.Path:
  """Returns the path of the library, compiled if it is not yet there."""
  name = f'cpu-{key()}.so'
  kept = folder()
  try:
    path = kept / name
    _make_private(kept)
    if intact(path):  # perhaps in a folder that cannot be written
      return path
    with _lock(kept / f'{name}.lock'):
      if not intact(path):
        _compile(path)
      return path
  except OSError as error:
    temporary = _process_folder()
    warnings.warn(
      f'quantlab: the folder of compiled kernels {kept} cannot be used '
      f'({error}); they are compiled for this process alone. Set '
      'QUANTLAB_CACHE to a folder of yours that can be written.',
      stacklevel=2,
    )
    path = temporary / name
    _compile(path)
    return path


def intact(path: pathlib.Path) -> bool:
  """Whether the library is there, with the content it was written with."""
  try:
    want = _sidecar(path).read_bytes().strip()
    return hashlib.sha256(path.read_bytes()).hexdigest().encode() == want
  except FileNotFoundError:
    return False


def discard(path: pathlib.Path) -> None:
  """Removes a library that does not load."""
  for p in (path, _sidecar(path)):
    p.unlink(missing_ok=True)


def _sidecar(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix('.sha256')


def _make_private(path: pathlib.Path) -> None:
  """Makes a folder that no one else can write: code is loaded from it."""
  path.mkdir(parents=True, exist_ok=True, mode=0o700)
  found = path.stat()
  if found.st_uid != os.getuid():
    raise PermissionError(f'{path} belongs to another user')
  if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
    raise PermissionError(f'{path} can be written by others')


@contextlib.contextmanager
def _lock(path: pathlib.Path) -> Iterator[None]:
  handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX)
    yield
  finally:
    os.close(handle)


@functools.cache
def _process_folder() -> pathlib.Path:
  """A folder of this process, removed with it."""
  made = tempfile.TemporaryDirectory(prefix='quantlab-')
  _KEPT.append(made)
  return pathlib.Path(made.name)


_KEPT: list[tempfile.TemporaryDirectory] = []


def _compile(path: pathlib.Path) -> None:
  """Compiles the library in a folder of its own, then moves it in place."""
  cxx, _ = compiler()
  with tempfile.TemporaryDirectory(dir=path.parent, prefix='build-') as made:
    work = pathlib.Path(made)
    running = {}
    for name, (source, flags) in OBJECTS.items():
      options = FLAGS if flags else (*FLAGS, '-I', jax.ffi.include_dir())
      command = [cxx, *options, *flags, '-w', '-c', str(SOURCE / source)]
      running[name] = subprocess.Popen(
        [*command, '-o', str(work / f'{name}.o')],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
    outputs = {name: p.communicate()[0] for name, p in running.items()}
    for name, process in running.items():
      if process.returncode:
        raise BuildError(f'{cxx} failed on {name}:\n{outputs[name][-2000:]}')
    made_so = work / 'made.so'
    objects = [str(work / f'{name}.o') for name in OBJECTS]
    linked = subprocess.run(
      [cxx, '-shared', '-pthread', '-o', str(made_so), *objects],
      capture_output=True,
      text=True,
      check=False,
    )
    if linked.returncode:
      raise BuildError(f'{cxx} failed to link:\n{linked.stderr[-2000:]}')
    digest = hashlib.sha256(made_so.read_bytes()).hexdigest()
    (work / 'made.sha256').write_text(digest)
    discard(path)
    os.replace(work / 'made.sha256', _sidecar(path))
    os.replace(made_so, path)


def main() -> None:
  """Compiles the library ahead of its first use, and prints its path."""
  why = supported()
  if why:
    raise SystemExit(why)
  try:
    print(build())
  except BuildError as error:
    raise SystemExit(str(error)) from error
