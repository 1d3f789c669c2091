"""Sites: the contractions of a traced program, and where their weights live.

One abstract pass over the program follows every value: does it depend on the
inputs, on which parameters, and is it a layout-only view of a parameter. A
contraction of an input-dependent value with a value known from the parameters
is a product with a weight; of two input-dependent values, a product of two
activations. Nothing is guessed from shapes or names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from quantlab.graph import _jaxpr, folds, naming, views, walker
from quantlab.ops import dims as dims_lib

Address = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Site:
  """One contraction of the traced program.

  Attributes:
    id: the weight's parameter path (`:k` for its k-th use), or for a product
      of two activations its name stack, else `<weight before it>/<kind>_<n>`.
    kind: 'dot', 'conv', 'gather' (embedding lookup) or 'ragged_dot'.
    paths: parameter leaves the weight comes from; the first names the site.
    derivation: 'leaf' (a layout-only view of parameters), 'effective'
      (computed from parameters), 'constant' (an array that is not a
      parameter) or 'activations' (no weight).
    side: which operand of the traced product is the weight (None: neither).
    loops: lengths of the layer loops (scans over stacked parameters) around
      it, outermost first; its state carries these axes.
    weight_loops: loops over which the stored weight is stacked.
    dims: roles of the operands' axes.
    lhs, rhs, out: shapes of the traced product inside its loops.
    dtype: dtype of the weight operand (of the left operand without weight).
    out_dtype: dtype of the product.
    macs: multiply-accumulates of the whole program run, loops included.
    inside: containers around it, outermost first.
    name: its name stack.
    refused: why it cannot be quantized, or None.
    address: where the product stands in the program.
    view: axis bookkeeping of the weight (None unless derivation is 'leaf').
    fold: the per-channel affine map that follows, if there is one.
    precision: of the traced product, as `lax.dot_general` takes it.
  """

  id: str
  kind: str
  paths: tuple[str, ...]
  derivation: str
  side: str | None
  loops: tuple[int, ...]
  weight_loops: tuple[int, ...]
  dims: dims_lib.Dims | None
  lhs: tuple[int, ...]
  rhs: tuple[int, ...]
  out: tuple[int, ...]
  dtype: str
  out_dtype: str
  macs: int
  inside: tuple[str, ...]
  name: str
  refused: str | None = None
  address: Address = dataclasses.field(default=(), compare=False)
  view: views.View | None = dataclasses.field(default=None, compare=False)
  fold: folds.Fold | None = dataclasses.field(default=None, compare=False)
  precision: Any = dataclasses.field(default=None, compare=False)

  @property
  def path(self) -> str | None:
    return self.paths[0] if self.paths else None

  @property
  def weight_shape(self) -> tuple[int, ...] | None:
    """Shape of the weight operand inside its loops."""
    if self.side is None:
      return None
    return self.rhs if self.side == 'rhs' else self.lhs

  @property
  def contraction(self) -> tuple[int, ...]:
    """Sizes of the contracted axes, in storage order."""
    shape = self.weight_shape if self.side else self.rhs
    if self.dims is None or shape is None:
      return ()
    return tuple(shape[i] for i in self.dims.w_contract)


@dataclasses.dataclass(frozen=True)
class Analysis:
  """Result of the pass.

  Attributes:
    sites: in program order.
    at: sites by address.
    other_uses: per parameter path, operations other than sites that read it
      as stored (a norm gain, a weight that is also regularized).
    lost_at: paths of the parameters that such an operation reads, by address.
    opaque: (primitive, number of products in it) of bodies never walked.
    outputs: parameter paths that are returned by the function as stored.
    layer_scans: addresses of the scans over stacked parameters.
  """

  sites: tuple[Site, ...]
  at: dict[Address, Site]
  other_uses: dict[str, tuple[str, ...]]
  opaque: tuple[tuple[str, int], ...]
  outputs: tuple[str, ...]
  layer_scans: frozenset[Address] = frozenset()
  lost_at: dict[Address, tuple[str, ...]] = dataclasses.field(
    default_factory=dict
  )


def analyse(
  program: _jaxpr.Program,
  paths: Sequence[str],
  constant_leaf: Callable[[Any], int | None] = lambda const: None,
) -> Analysis:
  """Finds the sites of a program whose parameters are named `paths`.

  Args:
    program: the traced function.
    paths: one parameter path per leading input of the program.
    constant_leaf: which parameter a closed-over array is, if any.
  """
  jaxpr = program.jaxpr
  shapes = [tuple(v.aval.shape) for v in jaxpr.invars[: len(paths)]]
  found = walker.Walker(tuple(paths), shapes, constant_leaf)
  args = [
    walker.whole(i, v) if i < program.num_params else walker.INPUT
    for i, v in enumerate(jaxpr.invars)
  ]
  outs = found.walk(jaxpr, program.consts, args, ())
  outputs = {paths[i] for v in outs if v.view for i in v.view.leaves}
  names = naming.names(found.sites)
  named = [
    Site(id=name, **fields)
    for name, fields in zip(names, found.sites, strict=True)
  ]
  uses: dict[str, set[str]] = {}
  for name, leaves in found.lost.values():
    for i in leaves:
      uses.setdefault(paths[i], set()).add(name)
  return Analysis(
    sites=tuple(named),
    at={s.address: s for s in named},
    other_uses={path: tuple(sorted(names)) for path, names in uses.items()},
    lost_at={
      address: tuple(sorted(paths[i] for i in leaves))
      for address, (_, leaves) in found.lost.items()
    },
    opaque=tuple(found.opaque),
    outputs=tuple(sorted(outputs)),
    layer_scans=frozenset(found.layer_scans),
  )


# Of a program in which no site matters.
NOTHING = Analysis((), {}, {}, (), ())
