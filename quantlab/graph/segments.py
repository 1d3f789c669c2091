"""A scan over layers as a chain of scans over layers of one format each.

Quantized arrays of different formats cannot be stacked. A stack whose layers
differ is held in parts, one for each run of layers that agree (`Segments`),
and the scan over it becomes one scan after another: the carry goes from each
to the next, what is stacked is joined. The result is an ordinary function of
an ordinary tree: whatever works on a user's function works on it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from quantlab.core import QTensor
from quantlab.core.tree import path_str
from quantlab.graph import _jaxpr, tracing
from quantlab.graph.sites import Address, Analysis


def bounds(lengths: Sequence[int]) -> list[tuple[int, int]]:
  """(first, end) of every segment."""
  return list(itertools.pairwise(itertools.accumulate(lengths, initial=0)))


def names(lengths: Sequence[int]) -> list[str]:
  """'[0]' of one layer, '[1-3]' of several, ends included."""
  return [
    f'[{a}]' if b == a + 1 else f'[{a}-{b - 1}]' for a, b in bounds(lengths)
  ]


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class Segments:
  """A stack of layers in parts: arrays or QTensors, each a shorter stack.

  A pytree node; its children are named by their layers ('[0]', '[1-3]').

  Attributes:
    parts: in the order of the layers, which are their first axis.
    lengths: layers in each part.
  """

  parts: tuple[Any, ...]
  lengths: tuple[int, ...]

  def tree_flatten_with_keys(self):
    keys = map(jax.tree_util.DictKey, names(self.lengths))
    return tuple(zip(keys, self.parts, strict=True)), self.lengths

  def tree_flatten(self):
    return self.parts, self.lengths

  @classmethod
  def tree_unflatten(cls, lengths, parts):
    return cls(tuple(parts), lengths)

  @classmethod
  def of(cls, stack: Any, lengths: tuple[int, ...]) -> Segments:
    """Cuts a stack: an array, or the shape of one."""
    if isinstance(stack, jax.ShapeDtypeStruct):
      rest = stack.shape[1:]
      parts = [jax.ShapeDtypeStruct((n, *rest), stack.dtype) for n in lengths]
    else:
      parts = [stack[a:b] for a, b in bounds(lengths)]
    return cls(tuple(parts), tuple(lengths))

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the whole stack."""
    return sum(self.lengths), *self.parts[0].shape[1:]

  @property
  def dtype(self) -> Any:
    return self.parts[0].dtype

  @property
  def nbytes(self) -> int:
    """Bytes of all parts."""
    return sum(p.nbytes for p in self.parts)

  def dequantize(self) -> jax.Array:
    """The whole stack, dense."""
    dense = [
      p.dequantize() if isinstance(p, QTensor) else p for p in self.parts
    ]
    return jnp.concatenate(dense)

  def __repr__(self) -> str:
    named = zip(names(self.lengths), self.parts, strict=True)
    return f'Segments({", ".join(f"{k}: {p!r}" for k, p in named)})'


@dataclasses.dataclass(frozen=True)
class Scan:
  """One scan that is run in segments.

  Attributes:
    lengths: layers in each.
    sites: what each of its sites is called in every segment, by id.
    paths: parameters that are held in parts.
  """

  lengths: tuple[int, ...]
  sites: Mapping[str, tuple[str, ...]]
  paths: tuple[str, ...]

  def to_json(self) -> dict[str, Any]:
    return {
      'lengths': list(self.lengths),
      'sites': {k: list(v) for k, v in self.sites.items()},
      'paths': list(self.paths),
    }

  @classmethod
  def from_json(cls, data: Mapping[str, Any]) -> Scan:
    sites = {k: tuple(v) for k, v in data['sites'].items()}
    return cls(tuple(data['lengths']), sites, tuple(data['paths']))


def is_segments(x: Any) -> bool:
  return isinstance(x, Segments)


def split(params: Any, scans: Sequence[Scan]) -> Any:
  """The tree with its stacks in parts; those that are stay as they are."""
  lengths = {p: s.lengths for s in scans for p in s.paths}

  def one(path, leaf):
    found = lengths.get(path_str(path))
    if found is None or isinstance(leaf, Segments | QTensor):
      return leaf
    return Segments.of(leaf, found)

  def is_leaf(x):
    return isinstance(x, Segments | QTensor)

  return jax.tree_util.tree_map_with_path(one, params, is_leaf=is_leaf)


def joined(params: Any) -> Any:
  """The tree with its stacks whole again; undoes `split`, on dense parts."""
  return jax.tree.map(
    lambda x: x.dequantize() if is_segments(x) else x,
    params,
    is_leaf=is_segments,
  )


def layer_scan(analysis: Analysis, address: Address) -> Address:
  """The scan over layers that an equation lies in."""
  return next(a for a in analysis.layer_scans if address[: len(a)] == a)


def segmented(apply: Callable, scans: Sequence[Scan]) -> Callable:
  """`apply` with its scans run in segments, of parameters in parts.

  Args:
    apply: the user's function of `(params, *args, **kwargs)`.
    scans: which.

  Returns:
    A function of the same arguments, with `split(params, scans)` in the place
    of `params`.
  """
  tracer = tracing.Tracer(apply)

  @functools.wraps(apply)
  def run(params, *args, **kwargs):
    whole = jax.tree.map(
      lambda x: _whole_shape(x) if is_segments(x) else x,
      params,
      is_leaf=is_segments,
    )
    traced, leaves, inputs = tracer(whole, args, kwargs)
    found = {
      path_str(path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(
        params, is_leaf=is_segments
      )
      if is_segments(leaf)
    }
    values = [
      found.get(p, x) for p, x in zip(traced.paths, leaves, strict=True)
    ]
    outs = _Chain(addresses(traced.analysis, scans)).run(
      traced.program, [*values, *inputs]
    )
    return jax.tree.unflatten(traced.program.out_tree, outs)

  return run


def addresses(
  analysis: Analysis, scans: Sequence[Scan]
) -> dict[Address, tuple[int, ...]]:
  """Where the scans are in a trace, and the lengths of their segments."""
  found = {}
  for scan in scans:
    for site in analysis.sites:
      if site.id in scan.sites:
        found[layer_scan(analysis, site.address)] = scan.lengths
  return found


def _whole_shape(x: Segments) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def is_reversed(program: _jaxpr.Program, scan: Address) -> bool:
  """Whether a scan begins with its last layer."""
  jaxpr = program.jaxpr
  for i, k in zip(scan[::2], scan[1::2], strict=False):
    jaxpr, _ = _jaxpr.inner_jaxprs(jaxpr.eqns[i])[k]
  return jaxpr.eqns[scan[-1]].params['reverse']


class _Chain:
  """Evaluates a program equation by equation, some of its scans in segments.

  Args:
    lengths: of the segments, by address of the scan.
  """

  def __init__(self, lengths: Mapping[Address, tuple[int, ...]]):
    self.lengths = lengths
    self.touched = {a[: i + 1] for a in lengths for i in range(len(a))}

  def run(self, program: _jaxpr.Program, args: Sequence[Any]) -> list[Any]:
    return _joined(self.walk(program.jaxpr, program.consts, args, ()))

  def walk(self, jaxpr, consts, args, address) -> list[Any]:
    env = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom):
      return atom.val if isinstance(atom, _jaxpr.Literal) else env[atom]

    for i, eqn in enumerate(jaxpr.eqns):
      vals = [read(v) for v in eqn.invars]
      outs = self.step(eqn, vals, (*address, i))
      env.update(zip(eqn.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]

  def step(self, eqn, vals, address) -> Sequence[Any]:
    if address in self.lengths:
      return self.chain(eqn, vals, self.lengths[address])
    if address in self.touched:
      return self.container(eqn, vals, address)
    if any(map(is_segments, vals)):
      return _layer_by_layer(eqn, vals) or _jaxpr.bind(eqn, _joined(vals))
    return _jaxpr.bind(eqn, vals)

  def chain(self, eqn, vals, lengths) -> list[Any]:
    """One scan after another; the last segment first where it is reversed."""
    [(jaxpr, consts)] = _jaxpr.inner_jaxprs(eqn)
    n_const, n_carry = _jaxpr.scan_counts(eqn)
    fixed = _joined(vals[:n_const])
    carry = _joined(vals[n_const : n_const + n_carry])
    xs = [_parts(v, lengths) for v in vals[n_const + n_carry :]]

    def body(carry, x):
      outs = self.walk(jaxpr, consts, [*fixed, *carry, *x], (-1,))
      return outs[:n_carry], outs[n_carry:]

    order = list(range(len(lengths)))
    ys: dict[int, Any] = {}
    for i in reversed(order) if eqn.params['reverse'] else order:
      part = [x[i] for x in xs]
      carry, ys[i] = _jaxpr.scan(eqn, body, carry, part, lengths[i])
    stacked = zip(*(ys[i] for i in order), strict=True)
    return [*carry, *(jnp.concatenate(y) for y in stacked)]

  def container(self, eqn, vals, address) -> Sequence[Any]:
    """A call or a loop around a scan in segments."""
    name = eqn.primitive.name
    bodies = _jaxpr.inner_jaxprs(eqn)
    if name in ('while', 'cond', 'shard_map') or len(bodies) != 1:
      raise ValueError(
        f'a scan whose layers have formats of their own lies inside {name!r}, '
        'where it cannot be run in segments; give its layers one format'
      )
    [(jaxpr, consts)] = bodies
    if name != 'scan':
      return _jaxpr.call(
        eqn, lambda args: self.walk(jaxpr, consts, args, (*address, 0)), vals
      )
    n_const, n_carry = _jaxpr.scan_counts(eqn)
    fixed, rest = vals[:n_const], _joined(vals[n_const:])

    def body(carry, x):
      args = [*fixed, *carry, *x]
      outs = _joined(self.walk(jaxpr, consts, args, (*address, 0)))
      return outs[:n_carry], outs[n_carry:]

    carry, ys = _jaxpr.scan(eqn, body, rest[:n_carry], rest[n_carry:])
    return [*carry, *ys]


def _joined(vals: Sequence[Any]) -> list[Any]:
  return [jnp.concatenate(v.parts) if is_segments(v) else v for v in vals]


def _parts(value: Any, lengths: Sequence[int]) -> Sequence[Any]:
  if is_segments(value) and value.lengths == tuple(lengths):
    return value.parts
  [value] = _joined([value])
  return [lax.slice_in_dim(value, a, b) for a, b in bounds(lengths)]


_ONE_BY_ONE = ('convert_element_type', 'copy', 'stop_gradient', 'neg')


def _layer_by_layer(eqn: Any, vals: Sequence[Any]) -> list[Any] | None:
  """An operation that leaves the axis of layers alone, on each part."""
  stack, name = vals[0], eqn.primitive.name
  if len(vals) != 1:
    return None
  if name in _ONE_BY_ONE or (
    name == 'transpose' and eqn.params['permutation'][0] == 0
  ):
    parts = [_jaxpr.bind(eqn, [p])[0] for p in stack.parts]
  elif (
    name == 'reshape'
    and eqn.params['dimensions'] is None
    and eqn.params['new_sizes'][:1] == stack.shape[:1]
  ):
    rest = eqn.params['new_sizes'][1:]
    parts = [p.reshape(p.shape[0], *rest) for p in stack.parts]
  else:
    return None
  return [Segments(tuple(parts), stack.lengths)]
