"""Blocks: a program cut into pieces that run one after another.

    parts = blocks(apply, params, *batch)
    stream = ()
    for block in parts:
      stream = block(block.take(flat), stream, block.context(*batch))

`flat` holds the parameters by path. What depends on the inputs alone (masks,
positions, the images themselves) is a block's context; what depends on no site
is computed again where it is needed. A scan over stacked layers is one block,
and its `inner` blocks, a layer's attention, its MLP, the next layer's, are a
chain that takes its place.

A block holds a program and its sites like a whole traced function, so that
whatever evaluates those (quantized, observed, simulated) evaluates a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from quantlab.core.tree import named_leaves
from quantlab.graph import _jaxpr, cuts, sites, tracing
from quantlab.graph import flat as flat_lib
from quantlab.graph import unroll as unroll_lib
from quantlab.graph.pieces import Context, Piece

Arrays = tuple[Any, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
  """A piece of a program between two cuts.

  Attributes:
    name: what its sites' names have in common; unique in the program.
    sites: ids of its sites in the whole program, in order.
    paths: its parameters, in the order of the program's first inputs.
    program: its own trace: (parameters, stream, context) to the stream out.
    analysis: the sites of `program`, by the ids of the whole program.
    stream_in, stream_out: shapes and dtypes of the stream; what is needed
      soonest comes first, what merely passes through follows.
    layer: which layer of a stack it is (one index per loop), or ().
    slices: the layer's index into those parameters that are stacked.
    inner: the layers of a scanned block one by one, as a chain of blocks.
  """

  name: str
  sites: tuple[str, ...]
  paths: tuple[str, ...]
  program: _jaxpr.Program
  analysis: sites.Analysis
  stream_in: tuple[jax.ShapeDtypeStruct, ...]
  stream_out: tuple[jax.ShapeDtypeStruct, ...]
  layer: tuple[int, ...]
  slices: Mapping[str, tuple[int, ...]]
  inner: tuple[Block, ...]
  _context: Context

  def __call__(
    self, params: Mapping[str, Any], stream: Arrays, context: Arrays
  ) -> Arrays:
    """The stream out; `params` as `take` gives them."""
    leaves = [params[path] for path in self.paths]
    return tuple(_jaxpr.evaluate(self.program, [*leaves, *stream, *context]))

  def context(self, *args: Any, **kwargs: Any) -> Arrays:
    """What the block needs of the function's inputs; `args` without params."""
    return self._context(*args, **kwargs)

  def take(self, params: Mapping[str, Any]) -> dict[str, Any]:
    """Its parameters out of all, by path, sliced to its layer."""
    return {
      path: _at(params[path], self.slices.get(path, ())) for path in self.paths
    }

  def put(
    self, params: Mapping[str, Any], mine: Mapping[str, Any]
  ) -> dict[str, Any]:
    """All parameters with this block's replaced; the inverse of `take`."""
    new = dict(params)
    for path, value in mine.items():
      at = self.slices.get(path)
      new[path] = value if at is None else _set(params[path], at, value)
    return new

  def __repr__(self) -> str:
    def shapes(stream):
      return ', '.join(f'{x.dtype}{list(x.shape)}' for x in stream)

    return (
      f'Block({self.name!r}, {len(self.sites)} sites, '
      f'({shapes(self.stream_in)}) -> ({shapes(self.stream_out)}))'
    )


def blocks(
  apply: Callable, params: Any, *args: Any, **kwargs: Any
) -> tuple[Block, ...]:
  """Cuts `apply(params, *args, **kwargs)` into blocks.

  Shapes are enough: params and args may be `ShapeDtypeStruct`s.
  """
  traced, _, _ = tracing.Tracer(apply)(params, args, kwargs)
  return of_traced(traced)


def run(
  parts: Sequence[Block], params: Any, *args: Any, **kwargs: Any
) -> list[Any]:
  """All blocks in order: the flat results of the whole function."""
  flat = dict(named_leaves(params))
  stream: Arrays = ()
  for block in parts:
    stream = block(block.take(flat), stream, block.context(*args, **kwargs))
  return list(stream)


def layers(parts: Sequence[Block]) -> tuple[Block, ...]:
  """The same chain with every scanned block replaced by its layers."""
  return tuple(
    b for part in parts for b in (layers(part.inner) if part.inner else (part,))
  )


def of_traced(traced: tracing.Traced) -> tuple[Block, ...]:
  """Cuts a traced function into blocks."""
  inside = {
    s.address[:n]
    for s in traced.analysis.sites
    for n in range(1, len(s.address) + 1)
  }

  def inline(eqn, address):  # custom derivative rules stay whole
    name = eqn.primitive.name
    return address in inside and name not in _jaxpr.CUSTOM_RULES

  flat = flat_lib.flatten(traced.program, traced.constant_leaf, inline)
  if not traced.analysis.sites:
    raise ValueError(
      'the function has no site (a product with a parameter), so there is '
      'nothing to cut into blocks'
    )
  builder = _Builder(traced)
  return builder.chain(flat, 0, len(flat.ops), (), (), flat.outs)


class _Builder:
  """Makes the blocks of one traced function."""

  def __init__(self, traced: tracing.Traced):
    self.traced = traced
    self.sites_of = flat_lib.site_ids(traced.analysis)
    self.names: dict[str, int] = {}
    self.known: dict[Any, tuple[_jaxpr.Program, sites.Analysis]] = {}

  def chain(self, flat, low, high, fixed, first, last) -> tuple[Block, ...]:
    """The blocks of operations [low, high).

    Args:
      flat: the program.
      low: first operation.
      high: one past the last operation.
      fixed: positions where there must be a cut.
      first: the stream that comes in.
      last: what goes out.
    """
    known = flat_lib.facts(flat, self.sites_of)
    live = cuts.liveness(flat, known)
    places = cuts.choose(flat, live, self.sites_of, low, high, fixed)
    streams = [first, *map(live.crossing, places), last]
    bounds = [low, *places, high]
    return tuple(
      self.block(Piece(flat, known, *bounds[k : k + 2], *streams[k : k + 2]))
      for k in range(len(bounds) - 1)
    )

  def block(self, piece: Piece) -> Block:
    flat = piece.flat
    ops, leaves, context = piece.collect()
    paths = tuple(self.traced.paths[flat.leaves[v].number] for v in leaves)
    program, analysis = self.trace(piece, ops, leaves, context, paths)
    slices = {
      path: flat.leaves[v].layer
      for path, v in zip(paths, leaves, strict=True)
      if flat.leaves[v].layer
    }
    layer = max(slices.values(), key=len, default=())
    return Block(
      name=self.name(analysis, layer),
      sites=tuple(s.id for s in analysis.sites),
      paths=paths,
      program=program,
      analysis=analysis,
      stream_in=tuple(map(piece.aval, piece.first)),
      stream_out=tuple(map(piece.aval, piece.last)),
      layer=layer,
      slices=slices,
      inner=self.inner(piece, ops),
      _context=Context(flat, tuple(context)),
    )

  def trace(self, piece, ops, leaves, context, paths):
    """The block as a program; the layers of one scan share theirs."""
    variables = [*leaves, *piece.first, *context]
    key = (piece.key(ops, variables), paths)
    if key not in self.known:
      program = _jaxpr.trace(
        lambda *values: piece.evaluate(ops, variables, values),
        len(leaves),
        [piece.flat.avals[v] for v in variables],
      )
      ids = [i for k in ops for i in self.sites_of(piece.flat.ops[k])]
      self.known[key] = program, _renamed(sites.analyse(program, paths), ids)
    return self.known[key]

  def inner(self, piece, ops) -> tuple[Block, ...]:
    """The layers of a piece that holds a scan over stacked parameters."""
    here = [
      k
      for k in ops
      if piece.flat.ops[k].address in self.traced.analysis.layer_scans
      and self.sites_of(piece.flat.ops[k])
    ]
    if len(here) != 1:
      return ()
    new = unroll_lib.unroll(piece.flat, here[0], piece.known, self.sites_of)
    last = unroll_lib.rename(piece.last, new.renamed)
    parts = self.chain(
      new.flat,
      piece.low,
      piece.high + new.longer,
      new.breaks,
      piece.first,
      last,
    )
    # A block of two layers of one stack could not name its parameters.
    clear = all(len(set(b.paths)) == len(b.paths) for b in parts)
    return parts if clear else ()

  def name(self, analysis, layer) -> str:
    """The common prefix of the sites' names, made unique."""
    names = [s.path for s in analysis.sites if s.path] or [
      s.id for s in analysis.sites
    ]
    parts = [n.split('/') for n in names] or [['start']]
    depth = 0
    shortest = max(
      min(map(len, parts)) - 1, int(parts.count(parts[0]) == len(parts))
    )
    while depth < shortest and len({p[depth] for p in parts}) == 1:
      depth += 1
    base = '/'.join(parts[0][:depth]) if depth else 'block'
    base += ''.join(f'[{i}]' for i in layer)
    count = self.names.get(base, 0)
    self.names[base] = count + 1
    return f'{base}:{count}' if count else base


def _renamed(analysis, ids) -> sites.Analysis:
  """The sites of a piece, by their ids in the whole program."""
  found = analysis.sites
  if len(found) != len(ids):
    raise RuntimeError(
      f'a block has the sites {[s.id for s in found]} where the program has '
      f'{ids}; please report the function'
    )
  named = tuple(
    dataclasses.replace(s, id=i) for s, i in zip(found, ids, strict=True)
  )
  return dataclasses.replace(
    analysis, sites=named, at={s.address: s for s in named}
  )


def _at(value: Any, layer: tuple[int, ...]) -> Any:
  return jax.tree.map(lambda x: x[layer], value) if layer else value


def _set(value: Any, layer: tuple[int, ...], new: Any) -> Any:
  return jax.tree.map(lambda x, y: x.at[layer].set(y), value, new)
