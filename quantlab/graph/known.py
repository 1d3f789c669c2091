"""What the parameters alone determine: effective weights T(w).

The program is evaluated without its inputs. Whatever depends on them is
`UNKNOWN`, and what is left is the partial evaluation that gives the weight
operand of each chosen site, with the affine map that is to be folded into it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from quantlab.graph import _jaxpr, folds, rewrite, tracing
from quantlab.graph.values import UNKNOWN, Lost


class _Latest:
  """Weights as statistics: the same at every step of a loop."""

  def __init__(self, folded: frozenset[str]):
    self.folded = folded

  def init(self, site):
    start = {'weight': jnp.zeros(site.weight_shape, site.dtype)}
    return start | (identity(site) if site.id in self.folded else {})

  def merge(self, site, a, b):
    return b


def identity(site: Any) -> dict[str, jax.Array]:
  """The map that changes nothing, of a site's product."""
  scale, shift = folds.identity(site.out, site.fold.axis, site.out_dtype)
  return {'scale': scale, 'shift': shift}


class _Knowing(rewrite.Evaluator):
  """Evaluates equations whose operands are known; records weights."""

  # Carries of the scan being walked that turned out to be unknown.
  _became: set[int] | None = None

  def run(self, args: Sequence[Any], state: rewrite.State):
    p = self.program
    values = [*self.leaves, *args]
    return self._walk(p.jaxpr, p.consts, values, state, ())

  def _product(self, eqn, site, vals, state):
    if site.id not in self.chosen:
      return [UNKNOWN], {}
    weight = vals[0 if site.side == 'lhs' else 1]
    if isinstance(weight, Lost):
      raise ValueError(
        f'the weight of site {site.id!r} cannot be computed apart from the '
        'inputs; leave it in float (rule None)'
      )
    extra = identity(site) if site.id in self.folded else {}
    return [UNKNOWN], {site.id: {'weight': weight, **extra}}

  def _gone(self, eqn, lost):
    return [UNKNOWN] * len(eqn.outvars)

  def _mapped(self, eqn, site, left, vals, stats):
    stat = stats[site.id]
    found = stat['scale'], stat['shift']
    other = vals[1 if left else 0]
    scale, shift = folds.step(eqn, left, other, site.fold.axis, found)
    stats[site.id] = {**stat, 'scale': scale, 'shift': shift}
    return UNKNOWN

  def _call(self, eqn, vals, state, address):
    [(jaxpr, consts)] = _jaxpr.inner_jaxprs(eqn)
    return self._walk(jaxpr, consts, vals, state, (*address, 0))

  def _scan(self, eqn, vals, state, address):
    if address not in self._touched:
      return [UNKNOWN] * len(eqn.outvars), {}
    n_const, vals = _jaxpr.scan_counts(eqn)[0], list(vals)
    outer = self._became
    while True:
      self._became = set()
      found = super()._scan(eqn, vals, state, address)
      if not self._became:
        break
      for i in self._became:  # known at first, but not after a step
        vals[n_const + i] = UNKNOWN
    self._became = outer
    return found

  def _kept(self, i, before, after):
    if isinstance(before, Lost) or not isinstance(after, Lost):
      return before if isinstance(before, Lost) else after
    assert self._became is not None  # set by _scan
    self._became.add(i)
    return before

  def _while(self, eqn, vals, state, address):
    return [UNKNOWN] * len(eqn.outvars), {}

  def _cond(self, eqn, vals, state, address):
    if address not in self._touched:
      return [UNKNOWN] * len(eqn.outvars), {}
    stats: rewrite.Stats = {}
    results = []
    for k, (jaxpr, consts) in enumerate(_jaxpr.inner_jaxprs(eqn)):
      outs, more = self._walk(jaxpr, consts, vals[1:], state, (*address, k))
      results.append(outs)
      stats.update(more)
    groups = zip(*results, strict=True)
    return [_choose(vals[0], group) for group in groups], stats


def _choose(index, group):
  """The chosen branch's result, if all is known."""
  if any(isinstance(v, Lost) for v in (index, *group)):
    return UNKNOWN
  return lax.select_n(index, *group)


def weights(
  traced: tracing.Traced,
  leaves: Sequence[Any],
  chosen: frozenset[str],
  folded: frozenset[str],
) -> dict[str, dict[str, jax.Array]]:
  """Weight operands of the chosen sites, layer loops in front.

  Args:
    traced: the traced call.
    leaves: dense parameters.
    chosen: sites with a weight.
    folded: those whose affine map goes into the weight.

  Returns:
    By site 'weight', and for folded sites 'shift' (loops..., channels), which
    is to be added to the product. Differentiable in the leaves.
  """
  if not chosen:
    return {}
  knowing = _Knowing(
    traced.program,
    traced.analysis,
    leaves,
    traced.paths,
    traced.constant_leaf,
    chosen,
    handler=_no_handler,
    monoid=_Latest(folded),
    folded=folded,
  )
  inputs = [UNKNOWN] * (len(traced.program.jaxpr.invars) - len(leaves))
  _, stats = knowing.run(inputs, {})
  sites = {s.id: s for s in traced.analysis.sites}
  return {k: _finish(sites[k], stat) for k, stat in stats.items()}


def _finish(site, stat):
  if 'scale' not in stat:
    return stat
  [channel] = site.dims.w_free

  def into(weight, scale):
    return folds.into_weight(weight, scale, channel)

  for _ in site.loops:
    into = jax.vmap(into)
  loops = stat['shift'].shape[: len(site.loops)]
  return {
    'weight': into(stat['weight'], stat['scale']),
    'shift': stat['shift'].reshape(*loops, -1),
  }


def _no_handler(site, lhs, rhs, default, state):
  raise AssertionError('a partial evaluation computes no product')
