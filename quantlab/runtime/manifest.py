"""What is needed to run the same thing again: versions, device, inputs."""

import hashlib
import importlib.metadata
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from quantlab.runtime import files

_PACKAGES = ('quantlab', 'jax', 'jaxlib', 'flax', 'numpy', 'orbax-checkpoint')


def environment() -> dict[str, Any]:
  """Versions and the device: what may change a result's last bits.

  No path and no host name: a manifest is meant to be published.
  """
  device = jax.devices()[0]
  return {
    'versions': {'python': platform.python_version()} | _versions(),
    'git': git_describe(),
    'device': {
      'platform': device.platform,
      'kind': device.device_kind,
      'count': jax.device_count(),
      'processes': jax.process_count(),
    },
    'x64': jax.dtypes.canonicalize_dtype('float64') == 'float64',
    'matmul_precision': getattr(
      jax.config, 'jax_default_matmul_precision', None
    ),
  }


def manifest(inputs: Mapping[str, Any], seed: int | None = None) -> dict:
  """The manifest of a result.

  Args:
    inputs: what went in, by name (config, recipe, plan, calibration): JSON
      values, of which the fingerprints are kept, or pytrees of arrays.
    seed: the one seed of the run.

  Returns:
    A JSON-able dict: environment, 'seed', 'fingerprints'.
  """
  return environment() | {
    'seed': seed,
    'fingerprints': {k: fingerprint(v) for k, v in inputs.items()},
  }


def fingerprint(value: Any) -> str:
  """Sixteen hex digits that name a JSON value or a pytree of arrays."""
  leaves = jax.tree.leaves(value)
  if any(hasattr(x, 'dtype') for x in leaves):
    return fingerprint_arrays(value)
  return files.fingerprint(value)


def fingerprint_arrays(tree: Any) -> str:
  """The same for a pytree of arrays: paths, shapes, dtypes and contents.

  Every process must call it when arrays are spread over several.
  """
  digest = hashlib.sha256()
  for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
    x = _whole(x)
    # As JAX takes it: the same numbers are the same model in float64 too.
    x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False)
    head = f'{jax.tree_util.keystr(path)} {x.dtype.name} {x.shape};'
    digest.update(head.encode())
    digest.update(np.ascontiguousarray(x).tobytes())
  return digest.hexdigest()[:16]


def _whole(x: Any) -> np.ndarray:
  """All of an array, also of one that other processes hold parts of."""
  if hasattr(x, 'dtype') and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.random.key_data(x)
  here = getattr(x, 'is_fully_addressable', True)
  if here or x.is_fully_replicated:
    return np.asarray(x)
  return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def differences(old: Any, new: Any, prefix: str = '') -> list[str]:
  """Where two JSON values differ: lines 'a.b[0]: 1 there, 2 here'."""
  if isinstance(old, Mapping) and isinstance(new, Mapping):
    lines = []
    for key in sorted({*old, *new}, key=str):
      at = f'{prefix}.{key}' if prefix else str(key)
      if key not in old:
        lines.append(f'{at}: absent there, {_short(new[key])} here')
      elif key not in new:
        lines.append(f'{at}: {_short(old[key])} there, absent here')
      else:
        lines += differences(old[key], new[key], at)
    return lines
  if old == new:
    return []
  if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
    lines = []
    for i, (a, b) in enumerate(zip(old, new, strict=True)):
      lines += differences(a, b, f'{prefix}[{i}]')
    return lines
  return [f'{prefix}: {_short(old)} there, {_short(new)} here']


def git_describe() -> str | None:
  """`git describe` of the checkout this package lies in, None outside one."""
  root = pathlib.Path(__file__).resolve().parents[2]
  if not (root / '.git').exists():  # installed, perhaps in another's checkout
    return None
  command = ['git', 'describe', '--always', '--dirty', '--tags']
  try:
    done = subprocess.run(
      command, cwd=root, capture_output=True, text=True, timeout=10, check=False
    )
  except (OSError, subprocess.TimeoutExpired):  # no git here
    return None
  return done.stdout.strip() or None if done.returncode == 0 else None


def _versions() -> dict[str, str | None]:
  found: dict[str, str | None] = {}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a bare tree
      found[name] = None
  return found


def _short(value: Any, limit: int = 60) -> str:
  text = files.dumps(value, indent=None)
  return text if len(text) <= limit else text[: limit - 3] + '...'
