"""Quantized models on disk: `save` and `load`, no template needed.

A checkpoint describes itself: beside the arrays its manifest holds the plan,
the report, and the structure of the parameters with every static field of the
quantized arrays (see `quantlab.structure`). Codes are always written in the
canonical layout, and nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from etils import epath

from quantlab import rewrites, structure
from quantlab.core import QTensor
from quantlab.core import tree as tree_lib
from quantlab.graph.tracing import is_stored
from quantlab.graph.values import Dropped
from quantlab.plan import Plan, Storage
from quantlab.prepacking import prepack
from quantlab.ptq.model import Quantized, restore
from quantlab.runtime import checkpoint
from quantlab.runtime.checkpoint import CheckpointError as CheckpointError

_MODEL = 'model'
_TREE = 'tree'


def save(
  path: epath.PathLike, model: Quantized, *, overwrite: bool = False
) -> dict[str, Any]:
  """Writes a quantized model; the folder appears when it is complete.

  Args:
    path: the folder to make.
    model: what `ql.ptq` or `ql.load` returned. The float function is not
      saved: it is code, and `load` takes it.
    overwrite: replace the checkpoint that is there. Anything else that is
      there is never removed.

  Returns:
    The manifest. `quantlab.runtime.checkpoint.identity` of it is equal for
    bit-identical models.

  Raises:
    FileExistsError: something is there already.
    ValueError: the parameters do not fit the plan, or hold a leaf that is no
      array or number.
  """
  if not isinstance(model, Quantized):
    raise TypeError(
      f'save takes what ql.ptq or ql.load returns, found '
      f'{type(model).__name__}; quantlab.io.save_tree saves a tree of arrays'
    )
  if rewrites.is_variables(model.params):
    model = prepack(model, 'canonical')
  if found := list(_misfits(model.plan, model.params)):
    raise ValueError(f'cannot save to {os.fspath(path)!r}: {_listed(found)}')
  about = {'plan': model.plan.to_json(), 'report': model.report}
  return _save(path, model.params, _MODEL, about, overwrite)


def load(
  path: epath.PathLike,
  apply: Any,
  *,
  like: Any = None,
  sharding: checkpoint.Sharding = None,
) -> Quantized:
  """Reads a quantized model back, bit for bit.

  Args:
    path: a folder that `save` made.
    apply: the float function that was quantized. One with products that the
      plan does not know is refused at the first call; one that lacks some of
      them is not told apart.
    like: parameters as the float model makes them, values aside; only needed
      where they hold containers other than dicts, lists and tuples (a
      FrozenDict, a NamedTuple, a module), which are filled with what was
      saved.
    sharding: where the arrays go: one sharding for all, or a function of
      (name, shape) such as ('weights/params/dense/kernel/codes', (64, 128));
      None puts them on the default device.

  Returns:
    The model: `model.apply(model.params, *batch)`.

  Raises:
    FileNotFoundError: nothing is there.
    CheckpointError: it is no checkpoint of a model, it was truncated or
      edited, a newer version wrote it, or its parts do not fit each other.
  """
  arrays, about = _read(path, _MODEL, sharding)
  name = os.fspath(path)
  params = _rebuild(name, about['tree'], arrays, like, inside='weights')
  try:
    plan = Plan.from_json(about['plan'])
  except (KeyError, TypeError, ValueError) as e:
    raise CheckpointError(f'the plan in {name!r} cannot be read: {e}') from e
  if found := list(_misfits(plan, params)):
    raise CheckpointError(f'checkpoint {name!r} is not whole: {_listed(found)}')
  model = restore(apply, params, plan)
  return dataclasses.replace(model, report=about['report'])


def save_tree(
  path: epath.PathLike,
  tree: Any,
  metadata: Mapping[str, Any] | None = None,
  *,
  overwrite: bool = False,
) -> dict[str, Any]:
  """Writes any tree of arrays, QTensors and numbers, as `save` does.

  Args:
    path: the folder to make.
    tree: what to write.
    metadata: JSON-able, given back by `load_tree`.
    overwrite: replace the checkpoint that is there.

  Returns:
    The manifest.
  """
  return _save(path, tree, _TREE, {'metadata': metadata or {}}, overwrite)


def load_tree(
  path: epath.PathLike,
  *,
  like: Any = None,
  sharding: checkpoint.Sharding = None,
) -> tuple[Any, dict[str, Any]]:
  """Reads back what `save_tree` wrote.

  Args:
    path: the folder.
    like: see `load`; here of the whole tree.
    sharding: see `load`.

  Returns:
    The tree and its metadata. NumPy arrays come back as JAX arrays unless
    JAX would change their dtype.
  """
  arrays, about = _read(path, _TREE, sharding)
  tree = _rebuild(os.fspath(path), about['tree'], arrays, like)
  return tree, about['metadata']


def _save(path, tree, kind, about, overwrite) -> dict[str, Any]:
  _check_target(path, overwrite)
  node, arrays = structure.describe(tree)
  metadata = {
    **about,
    'kind': kind,
    'tree': node,
    'nbytes': tree_lib.nbytes(tree),
  }
  return checkpoint.save_arrays(path, arrays, metadata, overwrite=overwrite)


def _check_target(path: epath.PathLike, overwrite: bool) -> None:
  """Refuses a folder that is taken, before any work."""
  name, path = os.fspath(path), epath.Path(path)
  if not path.exists():
    return
  if not overwrite:
    raise FileExistsError(
      f'{name!r} exists already; give another name, or overwrite=True to '
      'replace it.'
    )
  # A slip in a path must not cost a folder of other files.
  ours = {checkpoint.MANIFEST, checkpoint.ARRAYS}
  found = {p.name for p in path.iterdir()} if path.is_dir() else {path.name}
  if found - ours:
    raise FileExistsError(
      f'{name!r} is not a checkpoint: it holds {sorted(found - ours)[:4]}. '
      'overwrite=True replaces checkpoints alone; remove it, or give another '
      'name.'
    )


def _read(path, kind, sharding) -> tuple[dict[str, Any], dict[str, Any]]:
  """Arrays and metadata of a checkpoint of one kind."""
  found = checkpoint.read_manifest(path)['metadata'].get('kind')
  if found != kind:
    use = {_MODEL: 'ql.load', _TREE: 'quantlab.io.load_tree'}.get(found)
    raise CheckpointError(
      f'{os.fspath(path)!r} holds {found or "bare arrays"!r}, not a {kind}: '
      f'read it with {use or "quantlab.runtime.checkpoint.load_arrays"}.'
    )
  return checkpoint.load_arrays(path, sharding=sharding)


def _rebuild(name, node, arrays, like, inside=None) -> Any:
  """The tree; `like` stands for all of it or for the part under a key."""
  try:
    if like is None or inside is None:
      return structure.rebuild(node, arrays, like)
    parts = dict(node['items'])
    templates = {**dict.fromkeys(parts), inside: like}
    return {
      k: structure.rebuild(part, arrays, templates[k])
      for k, part in parts.items()
    }
  except (KeyError, TypeError, ValueError) as e:
    raise CheckpointError(f'the tree in {name!r} is not restored: {e}.') from e


# Whether parameters and plan belong together ----------------------------------


def _listed(found: list[str]) -> str:
  rest = f' (and {len(found) - 3} more)' if len(found) > 3 else ''
  return f'its plan and parameters differ: {"; ".join(found[:3])}{rest}.'


def _misfits(plan: Plan, params: Any) -> Iterator[str]:
  """Says where a variables tree is not what its plan describes."""
  if not rewrites.is_variables(params):
    yield "the parameters are no {'weights', 'sites', 'effective'}"
    return
  leaves = dict(tree_lib.named_leaves(params['weights'], is_leaf=is_stored))
  for path, storage in plan.leaves.items():
    yield from _storage_misfits(path, leaves.get(path), storage)
  effective = params.get('effective', {})
  for site, storage in plan.effective.items():
    yield from _storage_misfits(site, effective.get(site), storage)
  for site in effective.keys() - plan.effective.keys():
    yield f'{site!r} has an effective weight that the plan does not know'
  dropped = {k for k, leaf in leaves.items() if isinstance(leaf, Dropped)}
  for path in sorted(dropped ^ set(plan.dropped)):
    holds = 'no data' if path in dropped else 'data'
    yield f'{path!r} holds {holds}, the plan says otherwise'
  for path, (_, size) in plan.parameters.items():
    if path not in leaves:
      yield f'{path!r} is missing'
    elif (found := math.prod(leaves[path].shape)) != size:
      yield f'{path!r} has {found} elements, planned {size}'
  for site, roles in plan.abstract_state().items():
    yield from _state_misfits(site, params['sites'].get(site, {}), roles)


def _storage_misfits(name: str, q: Any, storage: Storage) -> Iterator[str]:
  if not isinstance(q, QTensor):
    found = 'nothing' if q is None else type(q).__name__
    yield f'{name!r} is planned as {storage.quantizer!r}, found {found}'
    return
  expected = dataclasses.replace(
    storage.abstract(), quantizer=storage.quantizer
  )
  for field in ('quantizer', 'k', 'layout', 'dtype', 'tag'):
    found, wanted = getattr(q, field), getattr(expected, field)
    if found != wanted:
      yield f'{name!r} has {field} {found!r}, planned {wanted!r}'
      return
  for child in ('codes', 'scale', 'zero_point', 'scale2', 'codebook'):
    found, wanted = (_aval(getattr(x, child)) for x in (q, expected))
    if found != wanted:
      yield f'the {child} of {name!r} are {found}, planned {wanted}'


def _state_misfits(
  site: str, state: Mapping[str, Any], roles: Mapping[str, Any]
) -> Iterator[str]:
  for role, fields in roles.items():
    for field, expected in fields.items():
      found = _aval(state.get(role, {}).get(field))
      if found != _aval(expected):
        yield (
          f'state {role}/{field} of site {site!r} is {found}, planned '
          f'{_aval(expected)}'
        )


def _aval(x: Any) -> str:
  return 'absent' if x is None else f'{jnp.dtype(x.dtype).name}{tuple(x.shape)}'
