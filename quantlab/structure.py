"""Trees as JSON and named arrays, and back.

`describe` splits a tree into its structure and its arrays; `rebuild` joins
them. The structure is nested nodes, plain JSON with a `kind`:

  None                   null
  dict                   items [[key, node], ...]: str and int keys stay apart
                         and in their order
  list, tuple            items [node, ...]
  array                  name, and whether its type is weak (a Python number's)
  key                    name of the key data, implementation: a typed PRNG key
  qtensor                children by name, static fields
  segments               items [node, ...], lengths: a stack of layers in parts
  dropped                shape and dtype of a parameter folded into another
  bool, int, float,      value (a complex number as its two parts)
    complex, str
  container              of any other type that JAX knows: type, items
  object                 any other leaf, such as a function: type alone

What a container or an object was cannot be told by its name without importing
and calling what a file names, so these two are filled into a tree that the
reader provides (`like`); everything else needs no template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quantlab.core import Layout, QTensor, Quantizer, rng
from quantlab.core import qtensor as qtensor_lib
from quantlab.core.tree import path_str
from quantlab.graph.segments import Segments, is_segments
from quantlab.graph.segments import names as segment_names
from quantlab.graph.tracing import is_stored
from quantlab.graph.values import Dropped

Node = Mapping[str, Any] | None
Path = tuple[str, ...]

_SCALARS = {t.__name__: t for t in (bool, int, float, complex, str)}
_CHILDREN = ('codes', 'scale', 'zero_point', 'scale2', 'codebook')


class StructureError(ValueError):
  """A tree that cannot be described, or a description that does not fit."""


# To nodes ---------------------------------------------------------------------


def describe(tree: Any) -> tuple[Node, dict[str, Any]]:
  """Splits a tree.

  Args:
    tree: containers, arrays, QTensors, Python numbers and strings.

  Returns:
    Its structure, and its arrays by unique name: the path joined by '/'.

  Raises:
    StructureError: a leaf cannot be stored; says which and what to do.
  """
  arrays: dict[str, Any] = {}
  return _describe(tree, (), arrays), arrays


def _describe(x: Any, path: Path, arrays: dict[str, Any]) -> Node:
  # Exact types: a subclass would come back as something else than it was.
  kind = type(x)
  if x is None:
    return None
  if kind is dict and all(type(k) in (str, int) for k in x):
    return {'kind': 'dict', 'items': _items(x.items(), path, arrays)}
  if kind in (list, tuple):
    items = _items(enumerate(x), path, arrays)
    return {'kind': kind.__name__, 'items': [node for _, node in items]}
  if kind is complex:
    return {'kind': 'complex', 'value': [x.real, x.imag]}
  if kind in _SCALARS.values():
    return {'kind': kind.__name__, 'value': x}
  if isinstance(x, QTensor):
    return _describe_qtensor(x, path, arrays)
  if isinstance(x, Segments):
    named = zip(segment_names(x.lengths), x.parts, strict=True)
    items = [node for _, node in _items(named, path, arrays)]
    return {'kind': 'segments', 'lengths': list(x.lengths), 'items': items}
  if isinstance(x, Dropped):
    return {'kind': 'dropped', 'shape': list(x.shape), 'dtype': x.dtype_name}
  if isinstance(x, jax.Array | np.ndarray | np.generic):
    return _describe_array(x, path, arrays)
  return _describe_other(x, path, arrays)


def _items(pairs, path: Path, arrays: dict[str, Any]) -> list[list[Any]]:
  return [[k, _describe(v, (*path, str(k)), arrays)] for k, v in pairs]


def _describe_array(x: Any, path: Path, arrays: dict[str, Any]) -> Node:
  if rng.is_key(x):
    impl = jax.random.key_impl(x)
    if not isinstance(impl, str):
      raise StructureError(
        f'{_name(path)!r} is a random key of the unregistered implementation '
        f'{impl!r}; save jax.random.key_data(key) instead'
      )
    data = jax.random.key_data(x)
    return {'kind': 'key', 'name': _add(data, path, arrays), 'impl': impl}
  if not _is_storable(x.dtype):
    raise StructureError(
      f'{_name(path)!r} is an array of dtype {x.dtype!r}; a checkpoint holds '
      'numbers and bools in native byte order. Convert it, or take it out of '
      'the tree'
    )
  node = {'kind': 'array', 'name': _add(x, path, arrays)}
  return {**node, 'weak': True} if getattr(x, 'weak_type', False) else node


def _is_storable(dtype: np.dtype) -> bool:
  if dtype.kind in 'OSUMm':
    return False
  try:
    return jnp.dtype(dtype.name) == dtype
  except TypeError:
    return False


def _describe_qtensor(q: QTensor, path: Path, arrays: dict[str, Any]) -> Node:
  if q.tag != qtensor_lib.CANONICAL:
    raise StructureError(
      f'{_name(path)!r} holds codes arranged as {q.tag!r}, for one device; a '
      f'checkpoint holds the layout {qtensor_lib.CANONICAL!r}, which every '
      "device can read. Use ql.save, or ql.prepack(model, 'canonical') first"
    )
  named = {name: getattr(q, name) for name in _CHILDREN}
  kept = {name: child for name, child in named.items() if child is not None}
  return {
    'kind': 'qtensor',
    'quantizer': q.quantizer.to_json(),
    'k': q.k,
    'layout': dataclasses.asdict(q.layout),
    'dtype': q.dtype.name,
    'tag': q.tag,
    'children': {
      name: _describe(child, (*path, name), arrays)
      for name, child in kept.items()
    },
  }


def _describe_other(x: Any, path: Path, arrays: dict[str, Any]) -> Node:
  found = _type_name(x)
  if isinstance(x, jax.ShapeDtypeStruct):
    raise StructureError(f'{_name(path)!r} is the shape of an array, no array')
  children = _children(x)
  if children is None:
    return {'kind': 'object', 'type': found}
  items = [[k, _describe(v, (*path, k), arrays)] for k, v in children]
  return {'kind': 'container', 'type': found, 'items': items}


def _children(x: Any) -> list[tuple[str, Any]] | None:
  """A container's direct children by name, or None for a leaf."""
  flat, _ = jax.tree_util.tree_flatten_with_path(
    x, is_leaf=lambda y: y is not x
  )
  if len(flat) == 1 and not flat[0][0]:
    return None
  return [(_parts(path)[0], child) for path, child in flat]


def _parts(keypath: Sequence[Any]) -> Path:
  return tuple(path_str((key,)) for key in keypath)


def _add(x: Any, path: Path, arrays: dict[str, Any]) -> str:
  base = name = _name(path)
  count = 1
  while name in arrays:  # {'a/b': ..., 'a': {'b': ...}}
    count += 1
    name = f'{base}~{count}'
  arrays[name] = x
  return name


def _name(path: Path) -> str:
  """The path as it is shown; an NNX variable's own part is empty."""
  return '/'.join(part for part in path if part) or '/'


def _type_name(x: Any) -> str:
  return f'{type(x).__module__}.{type(x).__qualname__}'


# From nodes -------------------------------------------------------------------


def rebuild(node: Node, arrays: Mapping[str, Any], like: Any = None) -> Any:
  """Undoes `describe`.

  Args:
    node: the structure.
    arrays: by name.
    like: a tree whose containers are filled; needed where the structure holds
      containers other than dicts, lists and tuples. Its leaves only have to
      have the same paths and, where both have one, the same shape.

  Raises:
    StructureError: `like` is needed or has other leaves; the node is unknown.
  """
  if like is None:
    return _rebuild(node, arrays, ())
  return _fill(node, arrays, like)


def _rebuild(node: Node, arrays: Mapping[str, Any], path: Path) -> Any:
  match node:
    case None:
      return None
    case {'kind': 'dict', 'items': items}:
      return {k: _rebuild(v, arrays, (*path, str(k))) for k, v in items}
    case {'kind': 'list' | 'tuple' as kind, 'items': items}:
      values = [
        _rebuild(v, arrays, (*path, str(i))) for i, v in enumerate(items)
      ]
      return values if kind == 'list' else tuple(values)
    case {'kind': 'container' | 'object', 'type': found}:
      raise StructureError(
        f'{_name(path)!r} is of type {found}, which is restored only into a '
        'tree of its kind: pass like=, the parameters as the model makes them '
        '(their values do not matter)'
      )
    case {'kind': str()}:
      return _leaf(node, arrays)
  raise StructureError(f'{_name(path)!r} is described by {node!r}')


def _leaf(node: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
  match node:
    case {'kind': 'array', 'name': name}:
      return _weak(arrays[name]) if node.get('weak') else arrays[name]
    case {'kind': 'key', 'name': name, 'impl': impl}:
      return jax.random.wrap_key_data(jnp.asarray(arrays[name]), impl=impl)
    case {'kind': 'segments', 'items': items, 'lengths': lengths}:
      parts = tuple(_leaf(part, arrays) for part in items)
      return Segments(parts, tuple(lengths))
    case {'kind': 'qtensor', 'children': children}:
      return _qtensor(node, {k: _leaf(v, arrays) for k, v in children.items()})
    case {'kind': 'dropped', 'shape': shape, 'dtype': dtype}:
      return Dropped(tuple(shape), dtype)
    case {'kind': 'complex', 'value': (real, imag)}:
      return complex(float(real), float(imag))
    case {'kind': kind, 'value': value} if kind in _SCALARS:
      return _SCALARS[kind](value)
  raise StructureError(f'nothing known is described by {node!r}')


def _qtensor(node: Mapping[str, Any], children: Mapping[str, Any]) -> QTensor:
  return QTensor(
    codes=children['codes'],
    scale=children['scale'],
    zero_point=children.get('zero_point'),
    scale2=children.get('scale2'),
    codebook=children.get('codebook'),
    quantizer=Quantizer.from_json(node['quantizer']),
    k=node['k'],
    layout=Layout(**{k: tuple(v) for k, v in node['layout'].items()}),
    dtype=jnp.dtype(node['dtype']),
    tag=node['tag'],
  )


def _weak(x: Any) -> Any:
  """The array with the weak type of Python numbers, which promotion heeds."""
  if not isinstance(x, jax.Array):
    return x
  blank = jnp.full(x.shape, x.dtype.type(0).item())
  if blank.dtype != x.dtype:
    return x
  return jax.device_put(blank.at[...].set(x), x.sharding)


def _fill(node: Node, arrays: Mapping[str, Any], like: Any) -> Any:
  """`like` with its leaves replaced by those of the node, path by path."""
  found = dict(_leaves(node, ()))
  flat, treedef = jax.tree_util.tree_flatten_with_path(
    like, is_leaf=lambda x: is_stored(x) or is_segments(x)
  )
  wanted = {_parts(path): leaf for path, leaf in flat}
  if found.keys() != wanted.keys():
    missing = sorted(_name(p) for p in found.keys() - wanted.keys())
    extra = sorted(_name(p) for p in wanted.keys() - found.keys())
    raise StructureError(
      f'like= has other leaves than were saved: it lacks {missing[:4]} '
      f'({len(missing)} in all) and has {extra[:4]} ({len(extra)}) beyond them'
    )
  values = []
  for path, given in wanted.items():
    saved = found[path]
    value = given if saved['kind'] == 'object' else _leaf(saved, arrays)
    shapes = [tuple(v.shape) for v in (value, given) if hasattr(v, 'shape')]
    if len(set(shapes)) > 1:
      raise StructureError(
        f'{_name(path)!r} was saved with shape {shapes[0]}; like= has it with '
        f'shape {shapes[1]}'
      )
    values.append(value)
  return jax.tree_util.tree_unflatten(treedef, values)


def _leaves(node: Node, path: Path) -> Iterator[tuple[Path, Any]]:
  match node:
    case None:
      return
    case {'kind': 'list' | 'tuple', 'items': items}:
      for i, child in enumerate(items):
        yield from _leaves(child, (*path, str(i)))
    case {'kind': 'segments'}:
      yield path, node
    case {'items': items}:
      for k, child in items:
        yield from _leaves(child, (*path, str(k)))
    case _:
      yield path, node
