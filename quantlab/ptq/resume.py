"""Checkpoints of the block walk: a killed run goes on where it was.

A folder `blocks` holds one checkpoint for each block that is done, with what
the block's weights became; `walk.json` says of which run. On resume both
streams pass through the finished blocks again, by the same compiled functions,
so that the rest comes out bit for bit as without the interruption. For that
codes also lie on the same devices again as they did.

Several processes (`jax.distributed`) share the folder: the first one writes it
and decides what is done.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from quantlab.core import QTensor
from quantlab.plan import Plan
from quantlab.ptq.transform import Context, Member
from quantlab.runtime import checkpoint, files, manifest

# What a block's weights became, by (kind, name, layer).
Entries = dict[tuple[str, str, tuple[int, ...]], Any]

_CHILDREN = ('codes', 'scale', 'zero_point', 'scale2', 'codebook')


class ResumeError(ValueError):
  """A folder that holds the walk of another run, with what differs."""


def fingerprints(ctx: Context, members: tuple[Member, ...]) -> dict[str, Any]:
  """What a walk depends on; two runs with equal ones have equal results."""
  found = manifest.environment()
  return {
    'params': manifest.fingerprint_arrays(ctx.params),
    'placement': files.fingerprint(
      [
        [_placement(x) for x in jax.tree.leaves(tree)]
        for tree in (ctx.params, next(iter(ctx.batches)))
      ]
    ),
    'state': manifest.fingerprint_arrays(ctx.state),
    'recipe': files.fingerprint(ctx.plan.to_json()),
    'calibration': files.fingerprint(
      [manifest.fingerprint_arrays(batch) for batch in ctx.batches]
    ),
    'key': None
    if ctx.key is None
    else manifest.fingerprint_arrays(jax.random.key_data(ctx.key)),
    'chain': [[m.name, dict(m.options)] for m in members],
    'versions': found['versions'],
    'device': found['device'],
    'x64': found['x64'],
    'matmul_precision': found['matmul_precision'],
  }


class Checkpoints:
  """The blocks that are done, of one run.

  Args:
    folder: where they are kept.
    fingerprint: of the run, see `fingerprints`.
    inputs: arrays of the run; what is read lies on their meshes again.

  Raises:
    ResumeError: the folder is another run's; every difference is named.
  """

  def __init__(
    self,
    folder: epath.PathLike,
    fingerprint: Mapping[str, Any],
    inputs: Any = (),
  ):
    self.folder = epath.Path(folder)
    self._meshes = [
      x.sharding.mesh for x in jax.tree.leaves(inputs) if _placement(x)
    ]
    path = self.folder / 'walk.json'
    mine = files.to_jsonable(fingerprint)
    if path.exists():
      lines = manifest.differences(files.read_json(path), mine)
      if lines:
        raise ResumeError(
          f'{os.fspath(self.folder)!r} holds the walk of another run:\n  '
          + '\n  '.join(lines)
          + '\nGive another workdir, or remove this one to start anew.'
        )
    elif jax.process_index() == 0:
      files.write_json(path, mine)

  def read(self, index: int, plan: Plan) -> tuple[Entries, dict] | None:
    """What was kept of a block, with its facts; None if it is not done."""
    path = self._path(index)
    if not _agreed(path.exists()):
      return None
    placed = checkpoint.read_manifest(path)['metadata'].get('placed', {})
    arrays, about = checkpoint.load_arrays(
      path, sharding=lambda name, _: self._sharding(placed.get(name))
    )
    parts: dict[Any, dict[str, Any]] = {}
    for number, entry in enumerate(about['entries']):
      kind, name, layer = entry['kind'], entry['name'], tuple(entry['layer'])
      parts[kind, name, layer] = {
        child: arrays[f'{number}/{child}'] for child in entry['children']
      }
    entries = {k: _joined(plan, k[0], k[1], v) for k, v in parts.items()}
    return entries, about['facts']

  def write(self, index: int, entries: Entries, facts: dict) -> None:
    """Keeps a finished block; whole or not at all."""
    arrays: dict[str, Any] = {}
    described = []
    for number, ((kind, name, layer), value) in enumerate(entries.items()):
      children = _children(value)
      arrays |= {f'{number}/{child}': x for child, x in children.items()}
      described.append(
        {
          'kind': kind,
          'name': name,
          'layer': list(layer),
          'children': list(children),
        }
      )
    placed = {k: where for k, x in arrays.items() if (where := _placement(x))}
    about = {'entries': described, 'facts': facts, 'placed': placed}
    checkpoint.save_arrays(self._path(index), arrays, about, overwrite=True)

  def _sharding(self, placement: Mapping[str, Any] | None):
    """Where an array lay, by its `_placement`."""
    if placement is None:
      return None
    for mesh in self._meshes:
      if [[k, n] for k, n in mesh.shape.items()] == placement['mesh']:
        parts = [
          tuple(p) if isinstance(p, list) else p for p in placement['spec']
        ]
        spec = jax.sharding.PartitionSpec(*parts)
        return jax.sharding.NamedSharding(mesh, spec)
    raise ResumeError(
      f'{os.fspath(self.folder)!r} was made on a mesh {placement["mesh"]} that '
      'no parameter and no batch lies on: put the batches on it, or remove '
      'this workdir to start anew.'
    )

  def _path(self, index: int) -> epath.Path:
    return self.folder / 'blocks' / f'{index:05d}'


def _placement(x: Any) -> dict[str, Any] | None:
  """Mesh and spec of an array that lies on a mesh, JSON-able."""
  sharding = getattr(x, 'sharding', None)
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return None
  return {
    'mesh': [[k, n] for k, n in sharding.mesh.shape.items()],
    'spec': [list(p) if isinstance(p, tuple) else p for p in sharding.spec],
  }


def _agreed(here: bool) -> bool:
  """What the first process finds: all must go the same way."""
  if jax.process_count() == 1:
    return here
  return bool(multihost_utils.broadcast_one_to_all(np.int32(here)))


def _children(value: Any) -> dict[str, Any]:
  if not isinstance(value, QTensor):
    return {'array': jnp.asarray(value)}
  found = {c: getattr(value, c) for c in _CHILDREN}
  return {c: x for c, x in found.items() if x is not None}


def _joined(plan: Plan, kind: str, name: str, children: dict[str, Any]) -> Any:
  """The array, or the QTensor that the plan describes."""
  if kind not in ('leaves', 'effective'):
    return children['array']
  storage = getattr(plan, kind)[name]
  return dataclasses.replace(
    storage.abstract(),
    quantizer=storage.quantizer,
    **{c: children.get(c) for c in _CHILDREN},
  )
