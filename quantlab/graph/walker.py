"""The abstract pass over a program that finds its contractions.

Every value is followed: does it depend on the inputs, on which parameters, and
is it a layout-only view of a parameter.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from quantlab.graph import _jaxpr, folds, roles, views

Address = tuple[int, ...]


class Value(NamedTuple):
  """What the analysis knows of one value.

  Attributes:
    deps: parameters it is computed from; empty where it depends on inputs.
    inputs: whether it depends on the inputs.
    view: axis bookkeeping, if it is a layout-only view of parameters.
    varies: whether it changes from step to step of a loop that is no loop
      over layers.
  """

  deps: frozenset[int] = frozenset()
  inputs: bool = False
  view: views.View | None = None
  varies: bool = False

  @property
  def is_weight(self) -> bool:
    """Known from the parameters, or a (dynamically indexed) view of one."""
    return self.view is not None or (bool(self.deps) and not self.inputs)


CONSTANT = Value()
INPUT = Value(inputs=True)


def whole(leaf: int, var: Any) -> Value:
  view = views.View.whole(leaf, var.aval.shape)
  return Value(frozenset([leaf]), False, view)


class _Loop(NamedTuple):
  kind: str
  length: int
  layers: bool


class Walker:
  """The abstract pass; `sites` collects fields of sites in program order."""

  def __init__(self, paths, shapes, constant_leaf):
    self.paths = paths
    self.shapes = shapes
    self.constant_leaf = constant_leaf
    self.sites: list[dict[str, Any]] = []  # fields of sites
    self.lost: dict[Address, tuple[str, set[int]]] = {}
    self.opaque: list[tuple[str, int]] = []
    self.layer_scans: set[Address] = set()
    self.loops: list[_Loop] = []
    self.names: list[str] = []
    self.recording = True

  def walk(self, jaxpr, consts, args, address) -> list[Value]:
    env: dict[Any, Value] = {}
    for var, const in zip(jaxpr.constvars, consts, strict=True):
      leaf = self.constant_leaf(const)
      if leaf is not None:
        env[var] = whole(leaf, var)
      else:  # a tracer of an outer transformation is no constant
        env[var] = INPUT if _jaxpr.is_tracer(const) else CONSTANT
    env.update(zip(jaxpr.invars, args, strict=True))
    first = len(self.sites)
    literal = _jaxpr.Literal
    for i, eqn in enumerate(jaxpr.eqns):
      vals = [
        CONSTANT if isinstance(v, literal) else env[v] for v in eqn.invars
      ]
      if eqn.primitive.name in _SPECIAL:
        outs = self.special(eqn, vals, (*address, i))
      else:
        outs = self.plain(eqn, vals, address, i)
      for var, out in zip(eqn.outvars, outs, strict=True):
        env[var] = out
    if self.recording and len(self.sites) > first:
      self.find_folds(jaxpr, env, first, address)
    return [
      CONSTANT if isinstance(v, literal) else env[v] for v in jaxpr.outvars
    ]

  def find_folds(self, jaxpr, env, first, address):
    """Attaches the affine map that follows each product of this level."""
    finder = folds.Finder(jaxpr, env)
    for site in self.sites[first:]:
      own = len(site['address']) == len(address) + 1
      # In a while loop there is no telling which layer's weight it is.
      if not own or site['side'] is None or 'while' in site['inside']:
        continue
      axis = roles.channel_axis(site['dims'], site['out'])
      if axis is not None:
        site['fold'] = finder.find(site['address'][-1], axis)

  def special(self, eqn, vals, address) -> Sequence[Value]:
    """A contraction, a lookup or a container."""
    name = eqn.primitive.name
    if name in roles.KINDS:
      self.contraction(eqn, vals, address)
      return [_merge(vals)]
    if name == 'gather':
      if self.lookup(eqn, vals, address):
        return [INPUT]
      return self.plain(eqn, vals, address[:-1], address[-1])
    self.names.append(_jaxpr.name_stack(eqn))
    outs = _CONTAINERS.get(name, Walker.call)(self, eqn, vals, address)
    self.names.pop()
    return outs

  def plain(self, eqn, vals, address, i) -> Sequence[Value]:
    """Any other operation: layout-only, or it reads what it reads."""
    # What is read through an effect (a ref) may come from anywhere.
    merged = INPUT if eqn.effects else _merge(vals)
    name, count = eqn.primitive.name, len(eqn.outvars)
    hidden = _jaxpr.opaque_contractions(eqn)
    if hidden and self.recording:
      self.opaque.append((name, hidden))
    for v in vals:
      if v.view is not None:
        break
    else:
      return (merged,) * count
    address = (*address, i)
    found = views.follow(eqn, [v.view for v in vals])
    if None in found:
      self.note_lost(name, vals, address)
    return [
      merged
      if view is None
      else Value(frozenset(view.leaves), merged.inputs, view, merged.varies)
      for view in found
    ]

  def note_lost(self, name, vals, address):
    if self.recording:
      leaves = {i for v in vals if v.view for i in v.view.leaves}
      if leaves:
        self.lost[address] = name, leaves

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
    xs = [v._replace(view=v.view.scan()) if v.view else v for v in stacked]
    for before, after in zip(stacked, xs, strict=True):
      if before.view and not after.view:
        self.note_lost('scan', [before], address)
    layers = any(v.deps and not v.inputs for v in xs)
    if layers:
      self.layer_scans.add(address)
    else:
      carry, xs = _varying(carry), _varying(xs)
    with self.entered(_Loop('scan', eqn.params['length'], layers)):

      def body(carry):
        return self.walk(jaxpr, consts, [*fixed, *carry, *xs], (*address, 0))

      carry = self.fixed_point(carry, lambda c: body(c)[:n_carry])
      outs = body(carry)
    ys = [_merge([v]) for v in outs[n_carry:]]
    return _leaving(vals, [*outs[:n_carry], *ys])

  def while_loop(self, eqn, vals, address):
    (test, test_consts), (body, body_consts) = _jaxpr.inner_jaxprs(eqn)
    n_test, n_body = _jaxpr.while_counts(eqn)
    fixed = vals[n_test : n_test + n_body]
    with self.entered(_Loop('while', 1, False)):

      def run(carry):
        return self.walk(body, body_consts, [*fixed, *carry], (*address, 1))

      carry = self.fixed_point(_varying(vals[n_test + n_body :]), run)
      test_vals = [*vals[:n_test], *carry]
      [more] = self.walk(test, test_consts, test_vals, (*address, 0))
      outs = run(carry)
    if more.inputs:  # the number of steps depends on the inputs
      outs = [v._replace(inputs=True) for v in outs]
    return _leaving(vals, outs)

  def cond(self, eqn, vals, address):
    results = []
    for k, (jaxpr, consts) in enumerate(_jaxpr.inner_jaxprs(eqn)):
      with self.entered(_Loop('cond', 1, False)):
        results.append(self.walk(jaxpr, consts, vals[1:], (*address, k)))
    outs = [_join(group) for group in zip(*results, strict=True)]
    index = vals[0]
    return [
      Value(
        o.deps | index.deps,
        o.inputs or index.inputs,
        o.view,
        o.varies or index.varies,
      )
      for o in outs
    ]

  def fixed_point(self, carry, step):
    """Repeats `step` unrecorded until the carry's knowledge is stable."""
    if all(v is INPUT for v in carry):
      return carry
    recording, self.recording = self.recording, False
    found = len(self.sites)
    while True:
      new = [
        _join([a, b]) for a, b in zip(carry, step(list(carry)), strict=True)
      ]
      if new == list(carry):
        break
      carry = new
    self.recording = recording
    del self.sites[found:]
    return carry

  @contextlib.contextmanager
  def entered(self, loop):
    self.loops.append(loop)
    yield
    self.loops.pop()

  # Sites --------------------------------------------------------------------

  def contraction(self, eqn, vals, address):
    lhs, rhs = vals[:2]
    if not (lhs.inputs or rhs.inputs):  # part of an effective weight
      self.note_lost(eqn.primitive.name, vals, address)
      return
    side = 'rhs' if rhs.is_weight else 'lhs' if lhs.is_weight else None
    if lhs.is_weight and rhs.is_weight:  # one of them indexed by an input
      side = 'lhs' if rhs.inputs else 'rhs'
    constant = None
    if side is None:
      known = {'rhs': not rhs.inputs, 'lhs': not lhs.inputs}
      constant = next((s for s in known if known[s]), None)
    weight = {'lhs': lhs, 'rhs': rhs}.get(side or '')
    kind = roles.KINDS[eqn.primitive.name]
    self.record(eqn, kind, side, weight, constant, address)

  def lookup(self, eqn, vals, address) -> bool:
    table, index = vals[:2]
    if not (table.is_weight and index.inputs):
      return False
    if roles.lookup_rows(eqn) is None:
      return False
    self.record(eqn, 'gather', 'lhs', table, None, address)
    return True

  def record(self, eqn, kind, side, weight, constant, address):
    if not self.recording:
      return
    view = weight.view if weight else None
    dims, refused = roles.of(eqn, kind, side, view)
    if (
      view is not None and dims is not None and not roles.separable(view, dims)
    ):
      self.note_lost(eqn.primitive.name, [weight], address)
      view = None
    inside = tuple(x.kind for x in self.loops)
    layers = tuple(x.length for x in self.loops if x.layers)
    shapes = [tuple(v.aval.shape) for v in (*eqn.invars[:2], eqn.outvars[0])]
    operand = eqn.invars[1 if side == 'rhs' else 0]
    trips = math.prod(x.length for x in self.loops)
    prefix = [n for n in (*self.names, _jaxpr.name_stack(eqn)) if n]
    self.sites.append(
      dict(  # noqa: C408 (reads as the call of Site that it becomes)
        kind=kind,
        paths=self.weight_paths(weight, view),
        derivation='constant' if constant else _derivation(weight, view),
        side=side,
        loops=layers,
        weight_loops=self.weight_loops(weight, view, layers),
        dims=dims,
        lhs=shapes[0],
        rhs=shapes[1],
        out=shapes[2],
        dtype=_jaxpr.dtype_name(operand.aval),
        out_dtype=_jaxpr.dtype_name(eqn.outvars[0].aval),
        macs=trips * roles.macs(kind, dims, shapes, side),
        inside=inside,
        name='/'.join(prefix),
        refused=refused or _refusal(weight, view, inside, constant),
        address=address,
        view=view,
        precision=eqn.params.get('precision'),
      )
    )

  def weight_paths(self, weight, view) -> tuple[str, ...]:
    """Leaves of the weight; the largest of an effective weight goes first."""
    if weight is None:
      return ()
    if view is not None:
      return tuple(dict.fromkeys(self.paths[i] for i in view.leaves))
    sizes = {i: math.prod(self.shapes[i]) for i in weight.deps}
    leaves = sorted(weight.deps, key=lambda i: (-sizes[i], i))
    return tuple(self.paths[i] for i in leaves)

  def weight_loops(self, weight, view, layers) -> tuple[int, ...]:
    """Layer loops over which the stored weight is stacked."""
    if weight is None:
      return ()
    if view is None:
      return layers
    shape = self.shapes[view.leaves[0]]
    return tuple(shape[axis] for axis in view.loops)


def _refusal(weight, view, inside, constant) -> str | None:
  if 'shard_map' in inside:
    return 'it lies inside shard_map; quantize the function inside it'
  if constant:
    return f'its {constant} operand is a constant, not a parameter'
  if weight is None or view is not None:
    return None
  if 'while' in inside:
    return 'its weight is computed inside a while loop'
  if weight.varies:
    return 'its weight changes from step to step of a loop'
  return None


def _derivation(weight, view) -> str:
  if weight is None:
    return 'activations'
  return 'leaf' if view is not None else 'effective'


def _merge(vals: Sequence[Value]) -> Value:
  """What is known of a value computed from others."""
  deps, varies = CONSTANT.deps, False
  for v in vals:
    if v.inputs:
      return INPUT
    if v.deps and v.deps is not deps:
      deps = deps | v.deps if deps else v.deps
    varies = varies or v.varies
  return Value(deps, False, None, varies) if deps or varies else CONSTANT


def _join(vals: Sequence[Value]) -> Value:
  """What is known of a value that is one of several."""
  first = vals[0]
  if all(v is first for v in vals):
    return first
  if first.view is not None and all(v.view == first.view for v in vals):
    inputs = any(v.inputs for v in vals)
    return Value(first.deps, inputs, first.view, any(v.varies for v in vals))
  return _merge(vals)


def _varying(vals: Sequence[Value]) -> list[Value]:
  return [v if v is INPUT else v._replace(varies=True) for v in vals]


def _leaving(vals: Sequence[Value], outs: Sequence[Value]) -> list[Value]:
  """Results of a loop: outside it they vary only if its operands do."""
  varies = any(v.varies for v in vals)
  return [v if v is INPUT else v._replace(varies=varies) for v in outs]


_SPECIAL = frozenset([*roles.KINDS, 'gather', *_jaxpr.CONTAINERS])
_CONTAINERS = {
  'scan': Walker.scan,
  'while': Walker.while_loop,
  'cond': Walker.cond,
}
