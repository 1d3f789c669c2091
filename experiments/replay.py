"""Making a quantized model again from its own manifest, and comparing."""

import os
import tempfile
from typing import Any

import jax
import ml_collections
import rich
from etils import epath

import quantlab as ql
from experiments import steps, variants
from quantlab import runtime
from quantlab.runtime import checkpoint, manifest


def run(path: epath.PathLike) -> int:
  """Replays a checkpoint that the launcher wrote.

  Args:
    path: its folder, or the manifest.json in it.

  Returns:
    0 where every array has the same bytes; 1 otherwise, differences printed.

  Raises:
    ConfigError: the manifest does not say how it was made, or data is absent.
  """
  path = epath.Path(path)
  folder = path.parent if path.name == checkpoint.MANIFEST else path
  old = checkpoint.read_manifest(folder)
  made = old['metadata'].get('report', {}).get('made')
  if made is None:
    raise variants.ConfigError(
      f'{os.fspath(folder)!r} does not say how it was made; only what '
      'experiments.ptq wrote can be replayed'
    )
  config = ml_collections.ConfigDict(made['config'])
  [variant] = [
    v for v in variants.resolve(config.variants) if v.name == made['variant']
  ]
  work = steps.load(config, made['model'])
  if work is None:
    raise variants.ConfigError(f'the data of {made["model"]} is absent')
  with tempfile.TemporaryDirectory() as temporary:
    key = jax.random.key(config.seed)
    model = steps.quantize(work, variant, key, epath.Path(temporary) / 'walk')
    new = ql.save(epath.Path(temporary) / 'model', model)
  return _compare(old, new, made['environment'])


def _compare(old: Any, new: Any, environment: Any) -> int:
  lines = manifest.differences(
    {k: _contents(old)[k] for k in ('plan', 'arrays')},
    {k: _contents(new)[k] for k in ('plan', 'arrays')},
  )
  if not lines:
    rich.print(f'identical: {len(new["arrays"])} arrays, bit for bit')
    return 0
  rich.print(f'[red]{len(lines)} differences[/]')
  print('\n'.join(lines[:20]))
  changed = manifest.differences(environment, runtime.environment())
  print('made with other versions or devices:' if changed else 'made alike')
  print('\n'.join(changed))
  return 1


def _contents(content: Any) -> dict[str, Any]:
  return {'plan': content['metadata']['plan'], 'arrays': content['arrays']}
