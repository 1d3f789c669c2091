"""The one rewrite: evaluates a traced program with its products replaced.

Equations are replayed in their own context; containers (jit, scan, cond,
while, remat) are rebuilt around their rewritten bodies only where a chosen
site lies inside or a quantized value flows in, everything else is evaluated
exactly as it was traced. `quantized`, `fake_quantized` and `observe` differ
only in their handler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
from jax import lax

from quantlab.core import LayoutError, QTensor
from quantlab.graph import _jaxpr, folds
from quantlab.graph.sites import Analysis, Site
from quantlab.graph.values import Dropped, Lost

State = dict[str, Any]
Stats = dict[str, Any]


class Handler(Protocol):
  """Replaces one product.

  Args:
    site: the contraction.
    lhs, rhs: its operands; the weight may be a QTensor.
    default: the traced product on dense operands.
    state: the site's state, sliced to the current layer of its loops.

  Returns:
    (the product, statistics or None).
  """

  def __call__(
    self, site: Site, lhs: Any, rhs: Any, default: Callable, state: State
  ) -> tuple[Any, Any]: ...


class Monoid(Protocol):
  """Statistics of a site: an identity and a merge."""

  def init(self, site: Site) -> Any: ...

  def merge(self, site: Site, a: Any, b: Any) -> Any: ...


@dataclasses.dataclass
class Evaluator:
  """Evaluates a program with `handler` at the chosen sites.

  Attributes:
    program, analysis: the traced function and its sites.
    leaves: parameter values (dense, QTensor or Dropped), in order.
    paths: their names.
    constant_leaf: which parameter a closed-over array is.
    chosen: ids of the sites the handler sees; a product with a QTensor
      operand is always seen.
    handler: see `Handler`.
    monoid: needed where statistics leave a loop or a branch.
    strict: error, not dequantization, where a quantized value reaches an
      operation without a rule.
    folded: ids of the sites whose affine map is already in their weight:
      the equations of the map are skipped.
    mapped: ids of the sites whose map is to be measured: their statistics
      get the map's 'scale' and 'shift'.
    report: notes on rules that were dropped or weights dequantized.
  """

  program: _jaxpr.Program
  analysis: Analysis
  leaves: Sequence[Any]
  paths: Sequence[str]
  constant_leaf: Callable[[Any], int | None]
  chosen: frozenset[str]
  handler: Handler
  monoid: Monoid | None = None
  strict: bool = True
  folded: frozenset[str] = frozenset()
  mapped: frozenset[str] = frozenset()
  report: list[str] = dataclasses.field(default_factory=list)

  def __post_init__(self):
    self._touched = {
      s.address[: i + 1]
      for s in self.analysis.sites
      if s.id in self.chosen
      for i in range(len(s.address))
    }
    self._maps = {
      (*s.address[:-1], i): (s, left)
      for s in self.analysis.sites
      if s.id in self.folded | self.mapped and s.fold
      for i, left in zip(s.fold.chain, s.fold.left, strict=True)
    }

  def run(self, args: Sequence[Any], state: State) -> tuple[list, Stats]:
    """Outputs and statistics by site id, for the program's other inputs."""
    values = [*map(_stored, self.leaves, self.paths), *args]
    p = self.program
    outs, stats = self._walk(p.jaxpr, p.consts, values, state, ())
    for out in outs:
      if isinstance(out, Lost):
        raise out.error('the output of the function')
    outs = [
      self._dense(o, 'the output of the function') for o in outs
    ]
    return outs, stats

  # The walk -----------------------------------------------------------------

  def _walk(self, jaxpr, consts, args, state, address):
    env: dict[Any, Any] = {}
    for var, const in zip(jaxpr.constvars, consts, strict=True):
      leaf = self.constant_leaf(const)
      env[var] = (
        const
        if leaf is None
        else _stored(self.leaves[leaf], self.paths[leaf])
      )
    env.update(zip(jaxpr.invars, args, strict=True))

    def read(atom):
      return atom.val if isinstance(atom, _jaxpr.Literal) else env[atom]

    stats: Stats = {}
    last_use = _last_use(jaxpr)
    for i, eqn in enumerate(jaxpr.eqns):
      vals = [read(v) for v in eqn.invars]
      site, left = self._maps.get((*address, i), (None, True))
      if site is not None and site.id in self.folded:
        outs, more = [vals[0 if left else 1]], {}
      else:
        outs, more = self._equation(eqn, vals, state, (*address, i))
      if site is not None and site.id in self.mapped:
        more = {site.id: _measure(eqn, site, left, vals, stats[site.id])}
      stats.update(more)
      env.update(zip(eqn.outvars, outs, strict=True))
      for var in last_use.get(i, ()):
        del env[var]
    return [read(v) for v in jaxpr.outvars], stats

  def _equation(self, eqn, vals, state, address):
    site = self.analysis.at.get(address)
    special = any(isinstance(v, QTensor | Lost) for v in vals)
    if site is not None and (special or site.id in self.chosen):
      return self._product(eqn, site, vals, state)
    if not special and address not in self._touched:
      return _jaxpr.bind(eqn, vals), {}
    name = eqn.primitive.name
    if _jaxpr.inner_jaxprs(eqn) and name != 'shard_map':
      rule = _CONTAINERS.get(name, Evaluator._call)
      return rule(self, eqn, vals, state, address)
    return self._plain(eqn, vals), {}

  def _plain(self, eqn, vals):
    """An ordinary operation with a quantized operand: layout-only, or not."""
    name = eqn.primitive.name
    lost = next((v for v in vals if isinstance(v, Lost)), None)
    if lost is not None:
      return [lost] * len(eqn.outvars)
    rule = _QTENSOR_RULES.get(name)
    first = next(v for v in vals if isinstance(v, QTensor))
    why = ''
    if rule is not None:
      try:
        return [rule(eqn, vals)]
      except LayoutError as error:
        why = f' ({error})'
    if self.strict:
      path = self._path_of(first)
      return [Lost(path, name + why)] * len(eqn.outvars)
    self.report.append(f'{self._path_of(first)}: dequantized for {name}')
    return _jaxpr.bind(eqn, [_densify(v) for v in vals])

  def _product(self, eqn, site, vals, state):
    mine = state.get(site.id, {})
    lhs, rhs = vals[:2]
    if 'effective' in mine:
      lhs, rhs = (
        (mine['effective'], rhs) if site.side == 'lhs'
        else (lhs, mine['effective'])
      )
    for operand in (lhs, rhs):
      if isinstance(operand, Lost):
        raise operand.error(f"site '{site.id}'")

    def default(a, b):
      [out] = _jaxpr.bind(eqn, [a, b, *vals[2:]])
      return out

    with _jaxpr.eqn_context(eqn):
      out, stats = self.handler(site, lhs, rhs, default, mine)
    return [out], {} if stats is None else {site.id: stats}

  def _dense(self, value, where):
    if not isinstance(value, QTensor):
      return value
    if self.strict:
      raise Lost(self._path_of(value), 'return').error(where)
    return value.dequantize()

  def _path_of(self, q: QTensor) -> str:
    """Names the parameters that a quantized value may come from."""
    same = [
      path
      for leaf, path in zip(self.leaves, self.paths, strict=True)
      if isinstance(leaf, QTensor) and leaf.quantizer == q.quantizer
    ]
    exact = [
      path
      for leaf, path in zip(self.leaves, self.paths, strict=True)
      if isinstance(leaf, QTensor) and leaf.codes is q.codes
    ]
    return ' | '.join(exact or same)

  # Containers ---------------------------------------------------------------

  def _call(self, eqn, vals, state, address):
    [(jaxpr, consts)] = _jaxpr.inner_jaxprs(eqn)
    name = eqn.primitive.name
    if name in _jaxpr.CUSTOM_RULES:
      self.report.append(
        f"{_jaxpr.name_stack(eqn) or name}: its custom derivative rule is not "
        'used, a quantized product lies inside'
      )
    fixed = name in ('jit', 'pjit') and _jaxpr.has_shardings(eqn)

    def body(args):
      values, inner_state = args
      if fixed:
        values = _jaxpr.constrain(eqn, 'in_shardings', values)
      outs, stats = self._walk(
        jaxpr, consts, values, inner_state, (*address, 0)
      )
      if fixed:
        outs = _jaxpr.constrain(eqn, 'out_shardings', outs)
      return outs, stats

    return _jaxpr.call(eqn, body, (vals, self._inside(state, address)))

  def _scan(self, eqn, vals, state, address):
    [(jaxpr, consts)] = _jaxpr.inner_jaxprs(eqn)
    n_const, n_carry = _jaxpr.scan_counts(eqn)
    fixed, carry = vals[:n_const], vals[n_const : n_const + n_carry]
    xs = vals[n_const + n_carry :]
    state = self._inside(state, address)
    # A scan over stacked layers gives each layer its own state and
    # statistics; any other scan (time steps) shares state, merges statistics.
    layers = address in self.analysis.layer_scans
    merging = not layers

    def body(carry, sliced):
      values, totals = carry
      x, layer_state = sliced
      outs, stats = self._walk(
        jaxpr, consts, [*fixed, *values, *x],
        layer_state if layers else state, (*address, 0),
      )
      ys = outs[n_carry:]
      if merging:
        totals = self._merge(totals, stats)
        stats = {}
      return (outs[:n_carry], totals), (ys, stats)

    totals = self._identity(address) if merging else {}
    (carry, totals), (ys, stats) = _jaxpr.scan(
      eqn, body, (list(carry), totals), (xs, state if layers else {})
    )
    return [*carry, *ys], totals if merging else stats

  def _while(self, eqn, vals, state, address):
    (test, test_consts), (body, body_consts) = _jaxpr.inner_jaxprs(eqn)
    n_test, n_body = _jaxpr.while_counts(eqn)
    test_args, body_args = vals[:n_test], vals[n_test : n_test + n_body]

    def go_on(carry):
      [flag], _ = self._walk(
        test, test_consts, [*test_args, *carry[0]], state, (*address, 0)
      )
      return flag

    def step(carry):
      values, totals = carry
      outs, stats = self._walk(
        body, body_consts, [*body_args, *values], state, (*address, 1)
      )
      return outs, self._merge(totals, stats)

    start = (list(vals[n_test + n_body :]), self._identity(address))
    return _jaxpr.while_loop(eqn, go_on, step, start)

  def _cond(self, eqn, vals, state, address):
    identity = self._identity(address)

    def branch(k, jaxpr, consts):
      def run(args):
        values, inner_state = args
        outs, stats = self._walk(
          jaxpr, consts, values, inner_state, (*address, k)
        )
        return outs, {**identity, **stats}

      return run

    bodies = [
      branch(k, *inner) for k, inner in enumerate(_jaxpr.inner_jaxprs(eqn))
    ]
    index = vals[0]
    if isinstance(index, QTensor | Lost):
      raise TypeError('a quantized parameter decides a lax.cond branch')
    inner = self._inside(state, address)
    return _jaxpr.cond(eqn, index, bodies, (vals[1:], inner))

  # State and statistics -----------------------------------------------------

  def _sites(self, address) -> list[Site]:
    n = len(address)
    return [s for s in self.analysis.sites if s.address[:n] == address]

  def _inside(self, state: State, address) -> State:
    ids = {s.id for s in self._sites(address)}
    return {k: v for k, v in state.items() if k in ids}

  def _merge(self, totals: Stats, stats: Stats) -> Stats:
    if not stats:
      return totals
    sites = {s.id: s for s in self.analysis.sites}
    if self.monoid is None:
      raise ValueError('statistics leave a loop: a monoid is needed')
    return {
      k: self.monoid.merge(sites[k], v, stats[k]) if k in stats else v
      for k, v in totals.items()
    }

  def _identity(self, address) -> Stats:
    if self.monoid is None:
      return {}
    found = {
      s.id: self.monoid.init(s)
      for s in self._sites(address)
      if s.id in self.chosen
    }
    return {k: v for k, v in found.items() if v is not None}


def _measure(eqn, site, left, vals, stat):
  """Adds one equation to the affine map in a site's statistics."""
  other = vals[1 if left else 0]
  scale, shift = folds.step(
    eqn, left, other, site.fold.axis, (stat['scale'], stat['shift'])
  )
  return {**stat, 'scale': scale, 'shift': shift}


def _stored(leaf, path):
  return Lost(path, 'its own storage') if isinstance(leaf, Dropped) else leaf


def _densify(value):
  return value.dequantize() if isinstance(value, QTensor) else value


def _last_use(jaxpr) -> dict[int, list[Any]]:
  """Variables that are dead after each equation, so that memory is freed."""
  seen: set[Any] = {
    v for v in jaxpr.outvars if not isinstance(v, _jaxpr.Literal)
  }
  out: dict[int, list[Any]] = {}
  for i in reversed(range(len(jaxpr.eqns))):
    eqn = jaxpr.eqns[i]
    for var in (*eqn.invars, *eqn.outvars):
      if isinstance(var, _jaxpr.Literal) or var in seen:
        continue
      seen.add(var)
      out.setdefault(i, []).append(var)
  return out


_CONTAINERS = {
  'scan': Evaluator._scan,
  'while': Evaluator._while,
  'cond': Evaluator._cond,
}


# Layout-only operations on quantized values ----------------------------------


def _slice(eqn, vals):
  p = eqn.params
  if p['strides'] is not None and any(s != 1 for s in p['strides']):
    raise LayoutError('a strided slice')
  return vals[0].slice(p['start_indices'], p['limit_indices'])


def _dynamic_slice(eqn, vals):
  """A dynamic index along loop axes slices every child alike."""
  q, starts = vals[0], vals[1:]
  sizes = eqn.params['slice_sizes']
  loops = q.codes.ndim - 2
  for axis, (size, full) in enumerate(zip(sizes, q.shape, strict=True)):
    if size == full:
      continue
    if axis >= loops:
      raise LayoutError('a dynamic slice of an axis that is not a loop axis')
    q = jax.tree.map(
      lambda c, s=starts[axis], n=size, a=axis: lax.dynamic_slice_in_dim(
        c, s, n, a
      ),
      q,
    )
  return q


def _broadcast(eqn, vals):
  where = eqn.params['broadcast_dimensions']
  new = eqn.params['shape']
  added = [i for i in range(len(new)) if i not in where]
  if any(new[i] != 1 for i in added) or any(
    new[w] != n for w, n in zip(where, vals[0].shape, strict=True)
  ):
    raise LayoutError('a broadcast')
  return vals[0].expand_dims(tuple(added))


def _concatenate(eqn, vals):
  if not all(isinstance(v, QTensor) for v in vals):
    raise LayoutError('joined with a value that is not quantized')
  return type(vals[0]).concatenate(vals, eqn.params['dimension'])


_QTENSOR_RULES: dict[str, Callable[[Any, Sequence[Any]], Any]] = {
  'transpose': lambda e, v: v[0].transpose(e.params['permutation']),
  'reshape': lambda e, v: v[0].reshape(e.params['new_sizes']),
  'squeeze': lambda e, v: v[0].squeeze(e.params['dimensions']),
  'expand_dims': lambda e, v: v[0].expand_dims(e.params['dimensions']),
  'broadcast_in_dim': _broadcast,
  'convert_element_type': lambda e, v: v[0].astype(e.params['new_dtype']),
  'slice': _slice,
  'dynamic_slice': _dynamic_slice,
  'concatenate': _concatenate,
  'copy': lambda e, v: v[0],
  'copy_p': lambda e, v: v[0],
  'stop_gradient': lambda e, v: v[0],
}
