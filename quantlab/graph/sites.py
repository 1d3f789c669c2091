"""Sites: the contractions of a traced program, and where their weights live.

One abstract pass over the program follows every value: does it depend on the
inputs, on which parameters, and is it a layout-only view of a parameter. A
contraction of an input-dependent value with a value known from the parameters
is a product with a weight; of two input-dependent values, a product of two
activations. Nothing is guessed from shapes or names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from quantlab.graph import _jaxpr, folds, views
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
    weight_loops: the part of `loops` over which the weight itself is stacked.
    dims: roles of the operands' axes.
    lhs, rhs, out: shapes of the traced product inside its loops.
    dtype: dtype of the weight operand (of the left operand without weight).
    out_dtype: dtype of the product.
    macs: multiply-accumulates of the whole program run, loops included.
    inside: containers around it, outermost first.
    name: its name stack.
    refused: why it cannot be quantized, or None.
    address: where the product stands in the program.
    views: axis bookkeeping of the weight (None unless derivation is 'leaf').
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


class Value(NamedTuple):
  """What the analysis knows of one value."""

  deps: frozenset[int] = frozenset()
  inputs: bool = False
  view: views.View | None = None

  @property
  def is_weight(self) -> bool:
    """Known from the parameters, or a (dynamically indexed) view of one."""
    return bool(self.deps) and (not self.inputs or self.view is not None)


@dataclasses.dataclass(frozen=True)
class Analysis:
  """Result of the pass.

  Attributes:
    sites: in program order.
    at: sites by address.
    other_uses: per parameter path, operations other than sites that read it
      as stored (a norm gain, a weight that is also regularized).
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
  sizes = [math.prod(v.aval.shape) for v in jaxpr.invars[: len(paths)]]
  walker = _Walker(tuple(paths), sizes, constant_leaf)
  args = [
    Value(frozenset([i]), False, views.View.whole(i, v.aval.shape))
    if i < program.num_params
    else Value(inputs=True)
    for i, v in enumerate(jaxpr.invars)
  ]
  outs = walker.walk(jaxpr, program.consts, args, ())
  outputs = {paths[i] for v in outs if v.view for i in v.view.leaves}
  named = _name(walker.found)
  return Analysis(
    sites=tuple(named),
    at={s.address: s for s in named},
    other_uses={
      paths[i]: tuple(sorted(names)) for i, names in walker.lost.items()
    },
    opaque=tuple(walker.opaque),
    outputs=tuple(sorted(outputs)),
    layer_scans=frozenset(walker.layer_scans),
  )


class _Loop(NamedTuple):
  kind: str
  length: int
  layers: bool


class _Walker:
  """The abstract pass; `found` collects sites in program order."""

  def __init__(self, paths, sizes, constant_leaf):
    self.paths = paths
    self.sizes = sizes
    self.constant_leaf = constant_leaf
    self.found: list[Site] = []
    self.lost: dict[int, set[str]] = {}
    self.opaque: list[tuple[str, int]] = []
    self.layer_scans: set[Address] = set()
    self.loops: list[_Loop] = []
    self.names: list[str] = []
    self.recording = True

  def walk(self, jaxpr, consts, args, address) -> list[Value]:
    env: dict[Any, Value] = {}
    for var, const in zip(jaxpr.constvars, consts, strict=True):
      leaf = self.constant_leaf(const)
      env[var] = (
        Value()
        if leaf is None
        else Value(
          frozenset([leaf]), False, views.View.whole(leaf, var.aval.shape)
        )
      )
    env.update(zip(jaxpr.invars, args, strict=True))
    first = len(self.found)

    def read(atom):
      return Value() if isinstance(atom, _jaxpr.Literal) else env[atom]

    for i, eqn in enumerate(jaxpr.eqns):
      vals = [read(v) for v in eqn.invars]
      outs = self.equation(eqn, vals, (*address, i))
      env.update(zip(eqn.outvars, outs, strict=True))
    self.find_folds(jaxpr, env, first, address)
    return [read(v) for v in jaxpr.outvars]

  def find_folds(self, jaxpr, env, first, address):
    """Attaches the affine map that follows each product of this level."""
    for k, site in enumerate(self.found[first:], first):
      axis = _channel_axis(site)
      if len(site.address) == len(address) + 1 and axis is not None:
        fold = folds.find(jaxpr, env, site.address[-1], axis)
        self.found[k] = dataclasses.replace(site, fold=fold)

  def equation(self, eqn, vals, address) -> list[Value]:
    name = eqn.primitive.name
    if name in _CONTRACTIONS:
      self.contraction(eqn, vals, address)
      return [_merge(vals)]
    if name == 'gather' and self.lookup(eqn, vals, address):
      return [Value(vals[0].deps | vals[1].deps, True)]
    if _jaxpr.inner_jaxprs(eqn):
      self.names.append(_jaxpr.name_stack(eqn))
      outs = _CONTAINERS.get(name, _Walker.call)(self, eqn, vals, address)
      self.names.pop()
      return outs
    if name in _VIEW_RULES and any(v.view for v in vals):
      view = _VIEW_RULES[name](eqn, vals)
      if view is not None:
        return [_merge(vals)._replace(view=view)]
    self.note_lost(name, vals)
    hidden = _jaxpr.opaque_contractions(eqn)
    if hidden and self.recording:
      self.opaque.append((name, hidden))
    return [_merge(vals)] * len(eqn.outvars)

  def note_lost(self, name, vals):
    if not self.recording:
      return
    for leaf in {i for v in vals if v.view for i in v.view.leaves}:
      self.lost.setdefault(leaf, set()).add(name)

  # Containers ---------------------------------------------------------------

  def call(self, eqn, vals, address):
    [(jaxpr, consts)] = _jaxpr.inner_jaxprs(eqn)
    with self.entered(_Loop(eqn.primitive.name, 1, False)):
      return self.walk(jaxpr, consts, vals, (*address, 0))

  def scan(self, eqn, vals, address):
    [(jaxpr, consts)] = _jaxpr.inner_jaxprs(eqn)
    n_const, n_carry = _jaxpr.scan_counts(eqn)
    fixed, carry = vals[:n_const], vals[n_const : n_const + n_carry]
    stacked = vals[n_const + n_carry :]
    xs = [v._replace(view=v.view.scan() if v.view else None) for v in stacked]
    for before, after in zip(stacked, xs, strict=True):
      if before.view and not after.view:
        self.note_lost('scan', [before])
    layers = any(v.deps and not v.inputs for v in xs)
    if layers:
      self.layer_scans.add(address)
    with self.entered(_Loop('scan', eqn.params['length'], layers)):

      def body(carry):
        return self.walk(jaxpr, consts, [*fixed, *carry, *xs], (*address, 0))

      carry = self.fixed_point(carry, lambda c: body(c)[:n_carry])
      outs = body(carry)
    return [*outs[:n_carry], *(v._replace(view=None) for v in outs[n_carry:])]

  def while_loop(self, eqn, vals, address):
    (test, test_consts), (body, body_consts) = _jaxpr.inner_jaxprs(eqn)
    n_test, n_body = _jaxpr.while_counts(eqn)
    fixed = vals[n_test : n_test + n_body]
    with self.entered(_Loop('while', 1, False)):

      def run(carry):
        return self.walk(body, body_consts, [*fixed, *carry], (*address, 1))

      carry = self.fixed_point(vals[n_test + n_body :], run)
      self.walk(test, test_consts, [*vals[:n_test], *carry], (*address, 0))
      return run(carry)

  def cond(self, eqn, vals, address):
    results = []
    for k, (jaxpr, consts) in enumerate(_jaxpr.inner_jaxprs(eqn)):
      with self.entered(_Loop('cond', 1, False)):
        results.append(self.walk(jaxpr, consts, vals[1:], (*address, k)))
    outs = [_join(group) for group in zip(*results, strict=True)]
    return [
      Value(o.deps | vals[0].deps, o.inputs or vals[0].inputs, o.view)
      for o in outs
    ]

  def fixed_point(self, carry, step):
    """Repeats `step` unrecorded until the carry's knowledge is stable."""
    recording, self.recording = self.recording, False
    while True:
      new = [
        _join([a, b]) for a, b in zip(carry, step(list(carry)), strict=True)
      ]
      if new == list(carry):
        break
      carry = new
    self.recording = recording
    return carry

  def entered(self, loop):
    return _Entered(self.loops, loop)

  # Sites --------------------------------------------------------------------

  def contraction(self, eqn, vals, address):
    lhs, rhs = vals[:2]
    if not (lhs.inputs or rhs.inputs):
      self.note_lost(eqn.primitive.name, vals)  # part of an effective weight
      return
    side = 'rhs' if rhs.is_weight else 'lhs' if lhs.is_weight else None
    if lhs.is_weight and rhs.is_weight:  # one of them indexed by an input
      side = 'lhs' if rhs.inputs else 'rhs'
    if side is None:
      constant = next((s for s, v in (('rhs', rhs), ('lhs', lhs))
                       if not v.inputs and not v.deps), None)
    else:
      constant = None
    weight = {'lhs': lhs, 'rhs': rhs}.get(side or '')
    self.record(eqn, _CONTRACTIONS[eqn.primitive.name], side, weight,
                constant, address)

  def lookup(self, eqn, vals, address) -> bool:
    table, index = vals[:2]
    d = eqn.params['dimension_numbers']
    shape = eqn.invars[0].aval.shape
    sizes = tuple(eqn.params['slice_sizes'])
    rows = tuple(d.collapsed_slice_dims)
    whole = all(s == n for i, (s, n) in enumerate(zip(sizes, shape))
                if i not in rows)
    plain = (
      table.is_weight
      and index.inputs
      and len(rows) == 1
      and tuple(d.start_index_map) == rows
      and not d.operand_batching_dims
      and whole
      and len(shape) >= 2
    )
    if plain:
      self.record(eqn, 'gather', 'lhs', table, None, address)
    return plain

  def record(self, eqn, kind, side, weight, constant, address):
    if not self.recording:
      return
    view = weight.view if weight else None
    dims, refused = _dims(eqn, kind, side, view)
    layers = [x for x in self.loops if x.layers]
    inside = tuple(x.kind for x in self.loops)
    if 'shard_map' in inside:
      refused = 'it lies inside shard_map; quantize the function inside it'
    if constant:
      refused = f'its {constant} operand is a constant, not a parameter'
    if view is not None and dims is not None and not _separable(view, dims):
      self.note_lost(eqn.primitive.name, [weight])
      view = None
    if view is None and weight is not None and 'while' in inside:
      refused = 'its weight is computed inside a while loop'
    shapes = [tuple(v.aval.shape) for v in (*eqn.invars[:2], eqn.outvars[0])]
    operand = eqn.invars[1 if side == 'rhs' else 0]
    trips = math.prod(x.length for x in self.loops)
    prefix = [n for n in (*self.names, _jaxpr.name_stack(eqn)) if n]
    self.found.append(
      Site(
        id='',
        kind=kind,
        paths=self.weight_paths(weight),
        derivation='constant' if constant else _derivation(weight, view),
        side=side,
        loops=tuple(x.length for x in layers),
        weight_loops=_weight_loops(self.loops, view, weight),
        dims=dims,
        lhs=shapes[0],
        rhs=shapes[1],
        out=shapes[2],
        dtype=str(operand.aval.dtype),
        out_dtype=str(eqn.outvars[0].aval.dtype),
        macs=trips * _macs(kind, dims, shapes, side),
        inside=inside,
        name='/'.join(prefix),
        refused=refused,
        address=address,
        view=view,
      )
    )

  def weight_paths(self, weight) -> tuple[str, ...]:
    """Leaves of the weight; the largest of an effective weight goes first."""
    if weight is None:
      return ()
    if weight.view is not None:
      return tuple(self.paths[i] for i in weight.view.leaves)
    leaves = sorted(weight.deps, key=lambda i: (-self.sizes[i], i))
    return tuple(self.paths[i] for i in leaves)


class _Entered:
  def __init__(self, stack, item):
    self.stack, self.item = stack, item

  def __enter__(self):
    self.stack.append(self.item)

  def __exit__(self, *exc):
    self.stack.pop()


def _weight_loops(loops, view, weight) -> tuple[int, ...]:
  """Layer loops whose sliced parameters reach this weight."""
  if weight is None:
    return ()
  layers = tuple(x.length for x in loops if x.layers)
  if view is None:
    return layers
  return layers[len(layers) - len(view.loops) :] if view.loops else ()


def _derivation(weight, view) -> str:
  if weight is None:
    return 'activations'
  return 'leaf' if view is not None else 'effective'


def _merge(vals: Sequence[Value]) -> Value:
  deps = frozenset().union(*(v.deps for v in vals)) if vals else frozenset()
  return Value(deps, any(v.inputs for v in vals))


def _join(vals: Sequence[Value]) -> Value:
  same = all(v.view == vals[0].view for v in vals)
  return _merge(vals)._replace(view=vals[0].view if same else None)


def _channel_axis(site: Site) -> int | None:
  """Axis of the product's result that runs over the weight's outputs."""
  if site.side is None or site.dims is None or len(site.dims.w_free) != 1:
    return None
  if isinstance(site.dims, dims_lib.ConvDims):
    return site.dims.out_spec[1]
  if isinstance(site.dims, dims_lib.DotDims):
    first = len(site.dims.w_batch)
    return first if site.dims.weight_first else len(site.out) - 1
  return None


# Roles of axes ---------------------------------------------------------------

_CONTRACTIONS = {
  'dot_general': 'dot',
  'conv_general_dilated': 'conv',
  'ragged_dot_general': 'ragged_dot',
}


def _dims(eqn, kind, side, view):
  """(axis roles, reason of refusal) of a contraction."""
  if kind == 'dot':
    return _dot_dims(eqn.params['dimension_numbers'], eqn, side, view), None
  if kind == 'conv':
    p = eqn.params
    if side == 'lhs' or side is None or p['batch_group_count'] != 1:
      return None, 'only a convolution whose kernel is the right operand'
    d = p['dimension_numbers']
    window = (p['window_strides'], p['padding'], p['lhs_dilation'],
              p['rhs_dilation'])
    return dims_lib.ConvDims(
      tuple(d.lhs_spec), tuple(d.rhs_spec), tuple(d.out_spec),
      p['feature_group_count'], window
    ), None
  if kind == 'gather':
    numbers = eqn.params['dimension_numbers']
    [row] = numbers.collapsed_slice_dims
    rest = [i for i in range(len(eqn.invars[0].aval.shape)) if i != row]
    if view is not None and view.joined is None:
      rest = list(views.order(view, rest))
    mode = str(eqn.params['mode']).split('.')[-1].lower()
    return dims_lib.GatherDims(
      row, tuple(rest), tuple(numbers.offset_dims), mode
    ), None
  return _ragged_dims(eqn, side, view)


def _dot_dims(numbers, eqn, side, view):
  (lc, rc), (lb, rb) = numbers
  free = [
    [i for i in range(len(v.aval.shape)) if i not in (*c, *b)]
    for v, c, b in ((eqn.invars[0], lc, lb), (eqn.invars[1], rc, rb))
  ]
  if side == 'lhs':
    x, w = (rb, free[1], rc), (lb, free[0], lc)
  else:
    x, w = (lb, free[0], lc), (rb, free[1], rc)
  w_contract, w_free = tuple(w[2]), tuple(w[1])
  if view is not None and view.joined is None:
    w_contract = views.order(view, w_contract)
    w_free = views.order(view, w_free)
  position = {axis: k for k, axis in enumerate(w[2])}
  x_contract = tuple(x[2][position[axis]] for axis in w_contract)
  return dims_lib.DotDims(
    tuple(x[0]), tuple(x[1]), x_contract, tuple(w[0]), w_free, w_contract,
    weight_first=side == 'lhs',
  )


def _ragged_dims(eqn, side, view):
  numbers = eqn.params['ragged_dot_dimension_numbers']
  (lc, rc), (lb, rb) = numbers.dot_dimension_numbers
  group = tuple(numbers.rhs_group_dimensions)
  if side != 'rhs' or lb or rb or len(group) != 1:
    return None, 'only a ragged product whose right operand is the weight'
  ndim = len(eqn.invars[1].aval.shape)
  free = tuple(i for i in range(ndim) if i not in (*rc, *group))
  x_free = tuple(i for i in range(len(eqn.invars[0].aval.shape))
                 if i not in lc)
  return dims_lib.RaggedDims(group, free, tuple(rc), tuple(lc), x_free), None


def _separable(view: views.View, dims) -> bool:
  """Whether each parameter axis lies wholly in one role."""
  if view.joined is not None and view.joined not in dims.w_free:
    return False
  for part in range(len(view.leaves)):
    roles = [
      set(view.axes(which, part))
      for which in (dims.w_batch, dims.w_contract, dims.w_free)
    ]
    if roles[0] & roles[1] or roles[0] & roles[2] or roles[1] & roles[2]:
      return False
  return True


def _macs(kind, dims, shapes, side) -> int:
  if kind == 'gather' or dims is None:
    return 0
  if kind == 'ragged_dot':
    k = math.prod(shapes[0][i] for i in dims.x_contract)
    return math.prod(shapes[2]) * k
  weight = shapes[0] if side == 'lhs' else shapes[1]
  return math.prod(shapes[2]) * math.prod(weight[i] for i in dims.w_contract)


# Layout-only operations ------------------------------------------------------


def _only(vals):
  return vals[0].view


def _rule_slice(eqn, vals):
  view, old = _only(vals), eqn.invars[0].aval.shape
  strides = eqn.params['strides']
  if strides is not None and any(s != 1 for s in strides):
    return None
  return _cut(view, old, eqn.outvars[0].aval.shape)


def _rule_dynamic_slice(eqn, vals):
  if vals[0].view is None:
    return None
  shape = eqn.outvars[0].aval.shape
  return _cut(vals[0].view, eqn.invars[0].aval.shape, shape)


def _cut(view, old, new):
  for axis, (a, b) in enumerate(zip(old, new, strict=True)):
    if a != b and view is not None:
      view = view.cut(axis, b)
  return view


def _rule_broadcast(eqn, vals):
  old = eqn.invars[0].aval.shape
  new = eqn.params['shape']
  where = eqn.params['broadcast_dimensions']
  same = all(new[w] == n for w, n in zip(where, old, strict=True))
  added = [i for i in range(len(new)) if i not in where]
  if not same or any(new[i] != 1 for i in added):
    return None
  return _only(vals).insert(added)


def _rule_convert(eqn, vals):
  floats = ('float16', 'bfloat16', 'float32', 'float64')
  kinds = (str(eqn.invars[0].aval.dtype), str(eqn.params['new_dtype']))
  return _only(vals) if all(k in floats for k in kinds) else None


def _rule_concatenate(eqn, vals):
  return views.join([v.view for v in vals], eqn.params['dimension'])


_VIEW_RULES: dict[str, Callable[[Any, Sequence[Value]], views.View | None]] = {
  'transpose': lambda e, v: _only(v).permute(e.params['permutation']),
  'reshape': lambda e, v: _only(v).reshape(e.params['new_sizes']),
  'squeeze': lambda e, v: _only(v).squeeze(e.params['dimensions']),
  'expand_dims': lambda e, v: _only(v).insert(e.params['dimensions']),
  'broadcast_in_dim': _rule_broadcast,
  'convert_element_type': _rule_convert,
  'slice': _rule_slice,
  'dynamic_slice': _rule_dynamic_slice,
  'concatenate': _rule_concatenate,
  'copy': lambda e, v: _only(v),
  'copy_p': lambda e, v: _only(v),
  'stop_gradient': lambda e, v: _only(v),
}

_CONTAINERS = {
  'scan': _Walker.scan,
  'while': _Walker.while_loop,
  'cond': _Walker.cond,
}


def _name(found: Sequence[Site]) -> list[Site]:
  """Gives every site its id."""
  used: dict[str, int] = {}
  named, nearest, since = [], '', 0
  for site in found:
    if site.paths:
      base = nearest = site.paths[0]
      since = 0
    else:
      base = site.name or '/'.join(
        p for p in (nearest, f'{site.kind}_{since}') if p
      )
      since += 1
    count = used.get(base, 0)
    used[base] = count + 1
    named.append(
      dataclasses.replace(site, id=f'{base}:{count}' if count else base)
    )
  return named
