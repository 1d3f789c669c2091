"""Checkpoints of the block walk: a killed run goes on where it was.

A folder `blocks` holds one checkpoint for each block that is done, with what
the block's weights became; `walk.json` says of which run. On resume both
streams pass through the finished blocks again, by the same compiled functions,
so that the rest comes out bit for bit as without the interruption.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

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

  Raises:
    ResumeError: the folder is another run's; every difference is named.
  """

  def __init__(self, folder: epath.PathLike, fingerprint: Mapping[str, Any]):
    self.folder = epath.Path(folder)
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
    if not path.exists():
      return None
    arrays, about = checkpoint.load_arrays(path)
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
    about = {'entries': described, 'facts': facts}
    checkpoint.save_arrays(self._path(index), arrays, about, overwrite=True)

  def _path(self, index: int) -> epath.Path:
    return self.folder / 'blocks' / f'{index:05d}'


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
