"""The one rewrite: a program evaluated with its products replaced.

Every site that is chosen, or that a quantized weight reaches, goes through
`handler(site, lhs, rhs, default, state)`. Other equations stay as they were
traced, whole stretches at a time; containers (jit, scan, cond, while, remat)
are rebuilt around their rewritten bodies only where a chosen site lies inside
or a quantized value flows in. `quantized`, `fake_quantized` and `observe`
differ only in their handler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from quantlab import ops
from quantlab.core import LayoutError, QTensor
from quantlab.graph import _jaxpr, layouts, statistics, stretches
from quantlab.graph.sites import Analysis, Site
from quantlab.graph.values import DROPPED, Dropped, Lost

State = dict[str, Any]
Stats = statistics.Stats


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


class Failure(NamedTuple):
  """A lost value that is needed: by a site, or (None) elsewhere."""

  site: str | None
  where: str
  lost: Lost


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
    report: notes on rules that were dropped or weights dequantized.
    failures: None raises where a lost value is needed; a list collects, and
      the evaluation goes on with zeros.
  """

  program: _jaxpr.Program
  analysis: Analysis
  leaves: Sequence[Any]
  paths: Sequence[str]
  constant_leaf: Callable[[Any], int | None]
  chosen: frozenset[str]
  handler: Handler
  monoid: statistics.Monoid | None = None
  strict: bool = True
  folded: frozenset[str] = frozenset()
  report: list[str] = dataclasses.field(default_factory=list)
  failures: list[Failure] | None = None

  def __post_init__(self):
    self._by_id = {s.id: s for s in self.analysis.sites}
    self._touched = {
      s.address[: i + 1]
      for s in self.analysis.sites
      if s.id in self.chosen
      for i in range(len(s.address))
    }
    self._maps = {
      (*s.address[:-1], i): (s, left)
      for s in self.analysis.sites
      if s.id in self.folded and s.fold
      for i, left in zip(s.fold.chain, s.fold.left, strict=True)
    }

  def run(self, args: Sequence[Any], state: State) -> tuple[list, Stats]:
    """Outputs and statistics by site id, for the program's other inputs."""
    values = [*map(_stored, self.leaves, self.paths), *args]
    p = self.program
    outs, stats = self._walk(p.jaxpr, p.consts, values, state, ())
    where = 'the output of the function'
    dense = [
      self._dense(out, where, var.aval)
      for out, var in zip(outs, p.jaxpr.outvars, strict=True)
    ]
    return dense, stats

  # The walk -----------------------------------------------------------------

  def _walk(self, jaxpr, consts, args, state, address):
    # Values of one level live in one trace: what is made of them may be shared.
    with ops.sharing():
      return self._level(jaxpr, consts, args, state, address)

  def _level(self, jaxpr, consts, args, state, address):
    env: dict[Any, Any] = {}
    for var, const in zip(jaxpr.constvars, consts, strict=True):
      leaf = self.constant_leaf(const)
      env[var] = (
        const if leaf is None else _stored(self.leaves[leaf], self.paths[leaf])
      )
    env.update(zip(jaxpr.invars, args, strict=True))
    uses = stretches.uses(jaxpr)
    stops = {
      i
      for i, eqn in enumerate(jaxpr.eqns)
      if (here := (*address, i)) in self._touched
      or here in self._maps
      or eqn.effects
    }
    for var, value in env.items():
      if isinstance(value, QTensor | Lost):
        stops.update(uses.get(var, ()))

    def read(atom):
      return atom.val if isinstance(atom, _jaxpr.Literal) else env[atom]

    stats: Stats = {}
    waiting: list[int] = []
    for i, eqn in enumerate(jaxpr.eqns):
      if i not in stops:
        waiting.append(i)
        continue
      stretches.evaluate(jaxpr, waiting, env, uses)
      waiting = []
      vals = [read(v) for v in eqn.invars]
      outs = self._step(eqn, vals, state, (*address, i), stats)
      for var, out in zip(eqn.outvars, outs, strict=True):
        env[var] = out
        if isinstance(out, QTensor | Lost):
          stops.update(uses.get(var, ()))
    stretches.evaluate(jaxpr, waiting, env, uses)
    return [read(v) for v in jaxpr.outvars], stats

  def _step(self, eqn, vals, state, address, stats) -> Sequence[Any]:
    """Evaluates one equation; adds its statistics to `stats`."""
    if address in self._maps:
      return [self._mapped(eqn, *self._maps[address], vals, stats)]
    outs, more = self._equation(eqn, vals, state, address)
    stats.update(more)
    return outs

  def _mapped(self, eqn, site, left, vals, stats):
    """One equation of a map that the weight already holds."""
    return vals[0 if left else 1]

  def _equation(self, eqn, vals, state, address):
    site = self.analysis.at.get(address)
    special = any(isinstance(v, QTensor | Lost) for v in vals)
    if site is not None and (special or site.id in self.chosen):
      return self._product(eqn, site, vals, state)
    if not special and address not in self._touched:
      return _jaxpr.bind(eqn, vals), {}
    name = eqn.primitive.name
    if _jaxpr.inner_jaxprs(eqn) and name != 'shard_map':
      rule = {
        'scan': self._scan,
        'while': self._while,
        'cond': self._cond,
      }.get(name, self._call)
      return rule(eqn, vals, state, address)
    return self._plain(eqn, vals, address), {}

  def _plain(self, eqn, vals, address):
    """An ordinary operation with a quantized operand: layout-only, or not."""
    lost = [v for v in vals if isinstance(v, Lost)]
    if lost:
      return self._gone(eqn, Lost.of(lost))
    name, why = eqn.primitive.name, ''
    try:
      found = layouts.follow(eqn, vals)
      if found is not None:
        return found
    except LayoutError as error:
      why = f' ({error})'
    paths = self._paths_at(address, vals)
    if self.strict:
      return self._gone(eqn, Lost(paths, name + why))
    self.report.append(f'{", ".join(paths)}: dequantized for {name}{why}')
    return _jaxpr.bind(eqn, [_densify(v) for v in vals])

  def _gone(self, eqn, lost):
    """Results that are lost; an effect (a print) may not be lost with them."""
    if eqn.effects:
      self._fail(lost, f"the effect of '{eqn.primitive.name}'")
    return [lost] * len(eqn.outvars)

  def _product(self, eqn, site, vals, state):
    mine = state.get(site.id, {})
    lhs, rhs = vals[:2]
    if 'effective' in mine:
      _check_shape(eqn, site, mine['effective'])
      lhs, rhs = (
        (mine['effective'], rhs)
        if site.side == 'lhs'
        else (lhs, mine['effective'])
      )
    lost = [v for v in (lhs, rhs, *vals[2:]) if isinstance(v, Lost)]
    if lost:
      where = f"site '{site.id}'"
      aval = eqn.outvars[0].aval
      return [self._needed(Lost.of(lost), where, aval, site.id)], {}

    def default(a, b):
      [out] = _jaxpr.bind(eqn, [a, b, *vals[2:]])
      return out

    with _jaxpr.eqn_context(eqn):
      if 'transform' in mine:
        found = mine['transform']
        if site.side == 'lhs':
          rhs = ops.adjust_input(rhs, site.dims, found)
        else:
          lhs = ops.adjust_input(lhs, site.dims, found)
      out, stats = self.handler(site, lhs, rhs, default, mine)
    return [out], {} if stats is None else {site.id: stats}

  # Lost values ----------------------------------------------------------------

  def _needed(self, lost, where, aval, site=None):
    """A lost value is needed: an error, or noted and zeros instead."""
    self._fail(lost, where, site)
    return jnp.zeros(aval.shape, aval.dtype)

  def _fail(self, lost, where, site=None):
    if self.failures is None:
      raise lost.error(where)
    self.failures.append(Failure(site, where, lost))

  def _dense(self, value, where, aval):
    """A value where only dense arrays will do."""
    if isinstance(value, QTensor):
      if not self.strict:
        self.report.append(f'{self._origin(value)}: dequantized for {where}')
        return value.dequantize()
      value = Lost((self._origin(value),), 'return')
    return (
      self._needed(value, where, aval) if isinstance(value, Lost) else value
    )

  def _paths_at(self, address, vals) -> tuple[str, ...]:
    """Names of the quantized parameters that an equation reads."""
    coded = {
      p
      for p, leaf in zip(self.paths, self.leaves, strict=True)
      if isinstance(leaf, QTensor | Dropped)
    }
    found = [p for p in self.analysis.lost_at.get(address, ()) if p in coded]
    if not found:
      found = [self._origin(v) for v in vals if isinstance(v, QTensor)]
    return tuple(sorted(set(found)))

  def _origin(self, q: QTensor) -> str:
    """Names the parameters that a quantized value may come from."""
    coded = [
      (path, leaf)
      for leaf, path in zip(self.leaves, self.paths, strict=True)
      if isinstance(leaf, QTensor)
    ]
    exact = [path for path, leaf in coded if leaf.codes is q.codes]
    same = [path for path, leaf in coded if leaf.quantizer == q.quantizer]
    return ' | '.join(exact or same)

  # Containers ---------------------------------------------------------------

  def _call(self, eqn, vals, state, address):
    [(jaxpr, consts)] = _jaxpr.inner_jaxprs(eqn)
    name = eqn.primitive.name
    if name in _jaxpr.CUSTOM_RULES:
      self.report.append(
        f'{_jaxpr.name_stack(eqn) or name}: the custom derivative rule of '
        f'{_jaxpr.function_name(eqn)} is not used, a quantized product lies '
        'inside'
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
    xs = [self._stacked(v, address) for v in vals[n_const + n_carry :]]
    state = self._inside(state, address)
    # A scan over stacked layers gives each layer its own state and
    # statistics; any other scan (time steps) shares state, merges statistics.
    layers = address in self.analysis.layer_scans

    def body(carry, sliced):
      values, totals = carry
      x, layer_state = sliced
      outs, stats = self._walk(
        jaxpr,
        consts,
        [*fixed, *values, *x],
        layer_state if layers else state,
        (*address, 0),
      )
      after = self._carried(values, outs[:n_carry])
      if layers:
        return (after, totals), (outs[n_carry:], stats)
      return (after, self._merge(totals, stats, address)), (outs[n_carry:], {})

    totals = {} if layers else self._identity(address)
    (carry, totals), (ys, stats) = _jaxpr.scan(
      eqn, body, (list(carry), totals), (xs, state if layers else {})
    )
    return [*carry, *ys], stats if layers else totals

  def _while(self, eqn, vals, state, address):
    (test, test_consts), (body, body_consts) = _jaxpr.inner_jaxprs(eqn)
    n_test, n_body = _jaxpr.while_counts(eqn)
    test_args, body_args = vals[:n_test], vals[n_test : n_test + n_body]

    def go_on(carry):
      [flag], _ = self._walk(
        test, test_consts, [*test_args, *carry[0]], state, (*address, 0)
      )
      return self._dense(flag, 'the test of a loop', test.outvars[0].aval)

    def step(carry):
      values, totals = carry
      outs, stats = self._walk(
        body, body_consts, [*body_args, *values], state, (*address, 1)
      )
      return self._carried(values, outs), self._merge(totals, stats, address)

    start = (list(vals[n_test + n_body :]), self._identity(address))
    return _jaxpr.while_loop(eqn, go_on, step, start)

  def _stacked(self, value, address):
    """A scanned operand: codes can be sliced along a loop axis only."""
    if not isinstance(value, QTensor) or layouts.loops_first(value):
      return value
    paths = self._paths_at(address, [value])
    if self.strict:
      return Lost(paths, 'scan (along an axis that is no loop axis)')
    self.report.append(f'{", ".join(paths)}: dequantized for scan')
    return value.dequantize()

  def _carried(self, before, after):
    """The carry of a loop keeps its kind: dense, quantized or lost."""
    return [
      self._kept(i, b, a)
      for i, (b, a) in enumerate(zip(before, after, strict=True))
    ]

  def _kept(self, i, before, after):
    if isinstance(before, Lost):
      return before
    where = 'the carry of a loop, which stays as it entered'
    if isinstance(before, QTensor):
      same = isinstance(after, QTensor) and layouts.alike(before, after)
      if not same:
        lost = Lost((self._origin(before),), 'the carry of a loop')
        self._needed(lost, where, before)
      return after if same else before
    return self._dense(after, where, _jaxpr.typeof(before))

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
    index = self._dense(vals[0], 'the choice of a branch', eqn.invars[0].aval)
    args = (list(vals[1:]), self._inside(state, address))
    if any(isinstance(v, QTensor | Lost) for v in args[0]):
      bodies = self._agreeing(bodies, args)
    return _jaxpr.cond(eqn, index, bodies, args)

  def _agreeing(self, bodies, args):
    """Branches whose results are of one kind: lost in one, lost in all."""
    results = [jax.eval_shape(body, args)[0] for body in bodies]
    lost = {}
    for i, group in enumerate(zip(*results, strict=True)):
      gone = [v for v in group if isinstance(v, Lost)]
      coded = [v for v in group if isinstance(v, QTensor)]
      if gone:
        lost[i] = Lost.of(gone)
      elif coded and not all(layouts.alike(coded[0], v) for v in group):
        paths = {self._origin(v) for v in coded}
        lost[i] = Lost(tuple(sorted(paths)), 'cond (branches of two kinds)')

    def wrap(body):
      def run(args):
        outs, stats = body(args)
        return [lost.get(i, out) for i, out in enumerate(outs)], stats

      return run

    return [wrap(body) for body in bodies]

  # State and statistics -----------------------------------------------------

  def _sites(self, address) -> list[Site]:
    n = len(address)
    return [s for s in self.analysis.sites if s.address[:n] == address]

  def _inside(self, state: State, address) -> State:
    if not state:
      return state
    ids = {s.id for s in self._sites(address)}
    return {k: v for k, v in state.items() if k in ids}

  def _merge(self, totals: Stats, stats: Stats, address) -> Stats:
    if not stats:
      return totals
    if self.monoid is None:
      raise ValueError('statistics leave a loop: a monoid is needed')
    merged = {
      k: statistics.merge(
        self.monoid, self.analysis, self._by_id[k], address, totals[k], new
      )
      for k, new in stats.items()
    }
    return {**totals, **merged}

  def _identity(self, address) -> Stats:
    if self.monoid is None:
      return {}
    chosen = [s for s in self._sites(address) if s.id in self.chosen]
    return statistics.identity(self.monoid, self.analysis, chosen, address)


def _check_shape(eqn, site, weight):
  """An effective weight is stored with the shape that planning saw."""
  want = eqn.invars[0 if site.side == 'lhs' else 1].aval.shape
  if tuple(weight.shape) != tuple(want):
    raise ValueError(
      f'the effective weight of site {site.id!r} has shape {weight.shape}, '
      f'this call needs {want}: it depends on the shapes of the inputs (a '
      'broadcast or sliced parameter). Plan for this shape, or leave the site '
      'in float (rule None)'
    )


def _stored(leaf, path):
  return Lost((path,), DROPPED) if isinstance(leaf, Dropped) else leaf


def _densify(value):
  return value.dequantize() if isinstance(value, QTensor) else value
