"""One block of the walk while its weights become codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from quantlab import handlers, rewrites
from quantlab.core.tree import named_leaves
from quantlab.graph import known, tracing
from quantlab.ptq.resume import Entries
from quantlab.ptq.transform import Context, Encoder, Target


class Local:
  """A block's leaves and state, partly codes and partly float.

  Attributes:
    block: the block.
    leaves: its parameters by path, as they are by now.
    entries: what became of them here, by (kind, name, layer).
  """

  def __init__(
    self, block: Any, ctx: Context, made: Entries, shared: frozenset[str]
  ):
    self.block, self.ctx, self.plan = block, ctx, ctx.plan
    self.shared = shared
    self._params = dict(named_leaves(ctx.params))
    self.traced = tracing.Traced(
      block.program, block.analysis, block.paths, lambda const: None
    )
    self.floats = dict(block.take(self._params))
    self.leaves = dict(self.floats)
    self.state = {
      s.id: jax.tree.map(
        lambda x: x[block.layer], dict(ctx.state.get(s.id, {}))
      )
      for s in block.analysis.sites
    }
    self.float_state = dict(self.state)
    self.encoded: set[str] = set()
    self.entries: Entries = {}
    for site in block.analysis.sites:  # tied to an earlier block
      for path in shared & set(site.paths):
        if ('leaves', path, ()) in made:
          self.leaves[path] = made['leaves', path, ()]
          self.encoded.add(site.id)
    self._float_step = jax.jit(self._float)
    self._coded_step: Any = None

  def wants(self, site) -> bool:
    return self.plan.sites[site.id].rule is not None

  # Codes ---------------------------------------------------------------------

  def encode(self, site, stat, encoder: Encoder) -> dict[str, Any]:
    """Turns one site's weight into codes; returns the encoder's facts."""
    rule = self.plan.sites[site.id].rule
    self.encoded.add(site.id)
    if rule is None or rule.weight is None or site.side is None:
      return {}
    if site.id in self.plan.effective:
      return self._encode_effective(site, stat, encoder)
    facts: dict[str, Any] = {}
    for path in site.paths:
      if path in self.shared:
        # A parameter of several sites has no one Hessian: plain rounding.
        if ('leaves', path, ()) not in self.entries:
          if self.leaves[path] is not self.floats[path]:
            continue  # coded in an earlier block
          target = Target(
            path, None, self._params[path], self.plan.leaves[path]
          )
          facts |= self._keep('leaves', target, None, encoder)
        self.leaves[path] = self.entries['leaves', path, ()]
        continue
      layer = self.block.slices.get(path, ())
      target = Target(
        path, site, self.leaves[path], self.plan.leaves[path], layer
      )
      facts |= self._keep('leaves', target, stat, encoder)
      self.leaves[path] = self.entries['leaves', path, layer]
    return facts

  def _encode_effective(self, site, stat, encoder) -> dict[str, Any]:
    plan, layer = self.plan, self.block.layer
    mine = frozenset([site.id])
    dense = [self.floats[p] for p in self.block.paths]
    found = jax.jit(
      lambda ls: known.weights(self.traced, ls, mine, plan.folded & mine)
    )(dense)[site.id]
    target = Target(
      site.id, site, found['weight'], plan.effective[site.id], layer
    )
    facts = self._keep('effective', target, stat, encoder)
    if 'shift' in found:
      self.entries['shifts', site.id, layer] = found['shift']
    self._place(site.id)
    return facts

  def _keep(self, kind, target: Target, stat, encoder) -> dict[str, Any]:
    q, facts = encoder.encode(target, stat, self.ctx.key)
    self.entries[kind, target.name, target.layer] = q
    layer = ''.join(f'[{i}]' for i in target.layer)
    return {target.name + layer: facts} if facts else {}

  def _place(self, site: str) -> None:
    """Puts a site's effective weight where its product finds it."""
    layer, state = self.block.layer, dict(self.state.get(site, {}))
    state['effective'] = self.entries['effective', site, layer]
    if ('shifts', site, layer) in self.entries:
      state['fold'] = {'shift': self.entries['shifts', site, layer]}
    self.state[site] = state

  def tuned(self, new: dict[str, Any]) -> None:
    """Replaces float parameters."""
    for path, value in new.items():
      self.leaves[path] = value
      self.entries['params', path, self.block.slices.get(path, ())] = value

  def restore(self, entries: Entries) -> None:
    """Takes the block as it was finished before."""
    self.entries = dict(entries)
    for (kind, name, _), value in entries.items():
      if kind in ('leaves', 'params'):
        self.leaves[name] = value
      elif kind == 'effective':
        self._place(name)
    self.encoded = {s.id for s in self.block.analysis.sites if self.wants(s)}

  # Both streams --------------------------------------------------------------

  def observed(self, observer, ids: Sequence[str]):
    """A function of (stream, context): statistics of the inputs of sites."""
    wanted = _Only(observer, ids)
    handler = handlers.observing(wanted, handlers.deploying(self.plan))
    plain = handlers.observing(wanted, handlers.computing)
    encoded = frozenset(self.encoded)
    chosen = frozenset(ids) | encoded | rewrites.adjusted(self.state)

    def mixed(site, lhs, rhs, default, state):
      inner = handler if site.id in encoded else plain
      return inner(site, lhs, rhs, default, state)

    @jax.jit
    def run(leaves, state, stream, context):
      return self._evaluator(
        leaves, mixed, chosen, self.plan.folded & encoded, wanted
      ).run([*stream, *context], state)[1]

    leaves = self._listed(self.leaves)
    return lambda stream, context: run(leaves, self.state, stream, context)

  def float_step(self, stream, context) -> tuple[Any, ...]:
    """The float stream after the block."""
    leaves = self._listed(self.floats)
    return self._float_step(leaves, self.float_state, stream, context)

  def _float(self, leaves, state, stream, context):
    chosen = rewrites.adjusted(state)
    evaluator = self._evaluator(leaves, handlers.computing, chosen, frozenset())
    return tuple(evaluator.run([*stream, *context], state)[0])

  def coded_step(self, stream, context) -> tuple[Any, ...]:
    """The quantized stream after the block; all its weights are codes."""
    if self._coded_step is None:
      self._coded_step = jax.jit(self.apply)
    return self._coded_step(self.leaves, stream, context)

  def apply(self, leaves, stream, context) -> tuple[Any, ...]:
    """The quantized block on its parameters by path."""
    encoded = frozenset(self.encoded)
    evaluator = self._evaluator(
      self._listed(leaves),
      handlers.deploying(self.plan),
      encoded | rewrites.adjusted(self.state),
      self.plan.folded & encoded,
    )
    return tuple(evaluator.run([*stream, *context], self.state)[0])

  def _evaluator(self, leaves, handler, chosen, folded, monoid=None):
    return rewrites.evaluator_of(
      self.traced, leaves, chosen, handler, monoid=monoid, folded=folded
    )

  def _listed(self, leaves) -> list[Any]:
    return [leaves[p] for p in self.block.paths]


class _Only:
  """An observer restricted to some sites."""

  def __init__(self, observer, ids: Iterable[str]):
    self.observer, self.ids = observer, frozenset(ids)

  def init(self, site):
    return self.observer.init(site) if site.id in self.ids else None

  def update(self, *args):
    return self.observer.update(*args)

  def merge(self, *args):
    return self.observer.merge(*args)
