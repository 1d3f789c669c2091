"""Named arrays on disk: orbax for the bytes, one manifest for their meaning.

A checkpoint is a folder

    manifest.json   what it is: version, metadata, every array's shape, dtype
                    and SHA-256, every file's size and SHA-256, and a digest
                    of all that
    arrays/         an orbax checkpoint, a flat dict of arrays

It appears under its name only when complete. Reading checks the files against
the manifest first, so a truncated or edited checkpoint is refused with the
file's name rather than by whatever a decoder makes of it. The hashes guard
against accidents, not against an adversary.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from quantlab.runtime import files

FORMAT = 'quantlab.checkpoint'
VERSION = 1
MANIFEST = 'manifest.json'
ARRAYS = 'arrays'

# Narrower than a byte: neither JAX nor NumPy packs these and not every store
# knows them, so their bytes are stored.
_SUB_BYTE = frozenset(
  {'int1', 'uint1', 'int2', 'uint2', 'int4', 'uint4'}
  | {'float4_e2m1fn', 'float6_e2m3fn', 'float6_e3m2fn'}
)

Sharding = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], Any] | None


class CheckpointError(ValueError):
  """A checkpoint that cannot be trusted, with the reason."""


def save_arrays(
  path: epath.PathLike,
  arrays: Mapping[str, Any],
  metadata: Mapping[str, Any],
  *,
  overwrite: bool = False,
) -> dict[str, Any]:
  """Writes named arrays and what they mean; the folder is whole or absent.

  Every process must call it when there are several.

  Args:
    path: the folder to make.
    arrays: NumPy or JAX arrays, sharded or not, by unique name.
    metadata: JSON-able.
    overwrite: replace a checkpoint of that name.

  Returns:
    The manifest.
  """
  path = epath.Path(os.path.abspath(path) if files.is_local(path) else path)
  content = {
    'format': FORMAT,
    'version': VERSION,
    'metadata': files.to_jsonable(metadata),
    'arrays': {name: _describe(x) for name, x in arrays.items()},
  }
  stored = {name: _to_stored(x) for name, x in arrays.items() if x.size}
  first = jax.process_index() == 0
  with (
    files.new_folder(path, overwrite)
    if first
    else contextlib.nullcontext(files.partial_name(path)) as partial
  ):
    barrier(f'made {path}')
    _write(partial, stored)
    barrier(f'wrote {path}')
    content['files'] = _describe_files(partial)
    content['digest'] = _digest(content)
    # The manifest is no file that another process may find while it lists them.
    barrier(f'described {path}')
    if first:
      files.write_json(partial / MANIFEST, content)
  barrier(f'saved {path}')
  return content


def identity(content: Mapping[str, Any]) -> str:
  """Names what a checkpoint holds: equal for bit-identical models.

  Unlike the digest it does not depend on how the bytes lie in files, so two
  runs of the same work can be compared by it.
  """
  kept = ('format', 'version', 'metadata', 'arrays')
  return files.fingerprint({k: content[k] for k in kept})


def read_manifest(path: epath.PathLike) -> dict[str, Any]:
  """Reads and checks what a checkpoint says of itself.

  Raises:
    FileNotFoundError: nothing is there.
    CheckpointError: it is not a checkpoint of this library, was made by a
      newer version, or its manifest was changed.
  """
  path = epath.Path(path)
  name = os.fspath(path)
  if not path.is_dir():
    raise FileNotFoundError(f'no checkpoint folder at {name!r}.')
  if not (path / MANIFEST).exists():
    found = sorted(p.name for p in path.iterdir())[:4]
    raise CheckpointError(
      f'{name!r} is not a quantlab checkpoint: no {MANIFEST} among {found}. '
      'Expected a folder written by ql.save.'
    )
  try:
    content = files.read_json(path / MANIFEST)
  except ValueError as e:
    raise CheckpointError(f'{name!r} has no readable manifest: {e}') from None
  if not isinstance(content, dict) or content.get('format') != FORMAT:
    raise CheckpointError(
      f'{name!r} is not a quantlab checkpoint: its {MANIFEST} says '
      f'format={content.get("format") if isinstance(content, dict) else None!r}'
      f', expected {FORMAT!r}.'
    )
  version = content.get('version')
  if not isinstance(version, int) or version > VERSION:
    raise CheckpointError(
      f'{name!r} has checkpoint {version=}; this quantlab reads versions up '
      f'to {VERSION}. Upgrade quantlab to read it.'
    )
  if content.get('digest') != _digest(content):
    raise CheckpointError(
      f'the manifest of {name!r} was edited or damaged: its digest does not '
      'match. Restore it from a copy, or save the model again.'
    )
  return content


def verify_files(path: epath.PathLike, content: Mapping[str, Any]) -> None:
  """Compares every file with the manifest.

  Raises:
    CheckpointError: naming the first file that is missing, shorter, longer
      or changed.
  """
  path = epath.Path(path)
  for name, expected in content['files'].items():
    file = path / name
    if not file.exists():
      what = 'is missing'
    elif (size := file.stat().length) != expected['size']:
      what = f'has {size} bytes, expected {expected["size"]}: truncated'
    elif files.hash_file(file) != expected['sha256']:
      what = 'has other contents than were saved: edited or damaged'
    else:
      continue
    raise CheckpointError(
      f'file {name!r} of checkpoint {os.fspath(path)!r} {what}. Restore it '
      'from a copy, or save the model again.'
    )


def load_arrays(
  path: epath.PathLike, *, sharding: Sharding = None
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Reads a checkpoint back.

  Args:
    path: the folder.
    sharding: where the arrays go: one sharding for all, or a function of
      (name, shape); None puts them on the default device.

  Returns:
    `(arrays by name, metadata)`. An array of a dtype that JAX would narrow
    (64 bits while x64 is off) stays a NumPy array.
  """
  path = epath.Path(os.path.abspath(path) if files.is_local(path) else path)
  content = read_manifest(path)
  verify_files(path, content)
  described = content['arrays']
  names = [n for n, d in described.items() if d['nbytes']]
  placed = {
    n: sharding(n, tuple(described[n]['shape']))
    if callable(sharding)
    else sharding
    for n in names
  }
  stored = _read(path / ARRAYS, placed) if names else {}
  arrays = {}
  for name, d in described.items():
    x = stored.get(name)
    if x is None:
      x = np.zeros(d['shape'], jnp.dtype(d['stored']))
    if list(x.shape) != d['shape'] or x.dtype.name != d['stored']:
      raise CheckpointError(
        f'array {name!r} of {os.fspath(path)!r} is {x.dtype.name}{x.shape}, '
        f'expected {d["stored"]}{tuple(d["shape"])}.'
      )
    arrays[name] = _from_stored(x, d['dtype'])
  return arrays, content['metadata']


def _write(folder: epath.Path, arrays: Mapping[str, Any]) -> None:
  if arrays:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      checkpointer.save(folder / ARRAYS, dict(arrays))


def _read(folder: epath.Path, placed: Mapping[str, Any]) -> dict[str, Any]:
  restore_args = {
    name: ocp.RestoreArgs(restore_type=np.ndarray)
    if where is None
    else ocp.ArrayRestoreArgs(sharding=where)
    for name, where in placed.items()
  }
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    return checkpointer.restore(
      folder,
      args=ocp.args.PyTreeRestore(
        item=dict.fromkeys(placed, 0), restore_args=restore_args
      ),
    )


def _describe(x: Any) -> dict[str, Any]:
  """What the manifest says of an array."""
  described = {
    'shape': list(x.shape),
    'dtype': x.dtype.name,
    'stored': 'uint8' if x.dtype.name in _SUB_BYTE else x.dtype.name,
    'nbytes': x.size * x.dtype.itemsize,
  }
  if _is_here(x):
    described['sha256'] = hashlib.sha256(
      np.ascontiguousarray(x).tobytes()
    ).hexdigest()
  return described


def _is_here(x: Any) -> bool:
  """Whether this process holds all of an array."""
  return getattr(x, 'is_fully_addressable', True)


def _to_stored(x: Any) -> Any:
  if x.dtype.name in _SUB_BYTE:
    return np.asarray(x).view(np.uint8)
  # Of several processes the first writes what each has a copy of: orbax takes
  # a NumPy array for that, and refuses a JAX array of one process.
  several = jax.process_count() > 1
  return np.asarray(x) if several and _is_here(x) else x


def _from_stored(x: Any, dtype: str) -> Any:
  """The array as it was, on the device unless JAX would change its dtype."""
  if x.dtype.name != dtype:
    placed = getattr(x, 'sharding', None)
    x = np.asarray(x).view(jnp.dtype(dtype))
    if placed is not None:
      return jax.device_put(x, placed)
  if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
    return np.asarray(x)
  return jnp.asarray(x)


def _describe_files(folder: epath.Path, prefix: str = '') -> dict[str, Any]:
  """Size and hash of every file below a folder, by relative path."""
  described: dict[str, Any] = {}
  for file in sorted(folder.iterdir()):
    name = f'{prefix}{file.name}'
    if file.is_dir():
      described |= _describe_files(file, f'{name}/')
    else:
      described[name] = {
        'size': file.stat().length,
        'sha256': files.hash_file(file),
      }
  return described


def barrier(name: str) -> None:
  """Waits for the other processes, when there are any."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _digest(content: Mapping[str, Any]) -> str:
  """SHA-256 of the manifest but for the digest itself."""
  rest = {k: v for k, v in content.items() if k != 'digest'}
  return hashlib.sha256(
    files.dumps(rest, indent=None).encode('utf-8')
  ).hexdigest()
