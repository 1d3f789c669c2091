"""The block walk: weights are encoded where their inputs are known.

Two streams go through the program's blocks: the float stream, what the float
model computes, and the quantized stream, what the model computes whose earlier
weights are codes already. In each block the sites are taken in the order of the
program, those with one input together: statistics of their inputs come from
the quantized stream, then their weights become codes, then the next see them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from quantlab import rewrites
from quantlab.calibration.batches import checked
from quantlab.core import QTensor
from quantlab.core.tree import named_leaves
from quantlab.graph import blocks as blocks_lib
from quantlab.graph import known, pairs, tracing
from quantlab.plan import Plan
from quantlab.ptq.transform import Context, Encoder, Target

State = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Result of encoding.

  Attributes:
    leaves: codes by parameter path.
    effective: codes by site id.
    shifts: shift of a folded BatchNorm, by site id.
    facts: what the encoder reported, by weight; errors by block.
  """

  leaves: dict[str, QTensor]
  effective: dict[str, QTensor]
  shifts: dict[str, jax.Array]
  facts: dict[str, Any]


def encode_all(ctx: Context, encoder: Encoder) -> Encoded:
  """Encodes every weight at once, for a member that needs no data."""
  plan, traced = ctx.plan, ctx.traced
  params = dict(named_leaves(ctx.params))
  leaves = [params[p] for p in traced.paths]
  found = jax.jit(lambda ls: _effective(traced, ls, plan))(leaves)
  coded, effective = {}, {}
  for path, storage in plan.leaves.items():
    target = Target(path, None, params[path], storage)
    coded[path], _ = encoder.encode(target, None, ctx.key)
  for name, stat in found.items():
    target = Target(name, None, stat['weight'], plan.effective[name])
    effective[name], _ = encoder.encode(target, None, ctx.key)
  shifts = {k: s['shift'] for k, s in found.items() if 'shift' in s}
  return Encoded(coded, effective, shifts, {})


def encode_blocks(ctx: Context, encoder: Encoder) -> Encoded:
  """Encodes weight by weight along the block walk."""
  parts = blocks_lib.layers(blocks_lib.of_traced(ctx.traced))
  params = dict(named_leaves(ctx.params))
  batches = list(checked(ctx.batches))
  walker = _Walker(ctx, encoder, params)
  floats: list[Any] = [() for _ in batches]
  coded: list[Any] = [() for _ in batches]
  for block in parts:
    contexts = [block.context(*args) for args in batches]
    floats, coded = walker.block(block, floats, coded, contexts)
  return walker.finish()


def _effective(traced, leaves, plan):
  return known.weights(traced, leaves, frozenset(plan.effective), plan.folded)


class _Walker:
  """Encodes block after block; holds codes as they are made."""

  def __init__(self, ctx: Context, encoder: Encoder, params):
    self.ctx, self.encoder, self.params = ctx, encoder, params
    self.plan: Plan = ctx.plan
    self.observer = encoder.observe(self.plan)  # type: ignore[misc]
    self.shared = _shared(self.plan)
    # (name, layer) -> codes; a layer of a stack is one entry.
    self.leaves: dict[tuple[str, tuple[int, ...]], QTensor] = {}
    self.effective: dict[tuple[str, tuple[int, ...]], QTensor] = {}
    self.shifts: dict[tuple[str, tuple[int, ...]], jax.Array] = {}
    self.facts: dict[str, Any] = {}
    self.errors: list[dict[str, Any]] = []

  def block(self, block, floats, coded, contexts):
    """Encodes one block's weights; advances both streams through it."""
    local = _Local(self, block)
    for group in _groups(block):
      chosen = [s for s in group if local.wants(s)]
      if not chosen:
        continue
      stats = local.observe([s.id for s in chosen], coded, contexts)
      for site in chosen:
        local.encode(site, stats.get(site.id))
    run = jax.jit(block.__call__)
    mine = block.take(self.params)
    floats = [run(mine, s, c) for s, c in zip(floats, contexts, strict=True)]
    coded = local.advance(coded, contexts)
    self.errors.append(
      {'block': block.name, 'relative_error': _error(floats, coded)}
    )
    return floats, coded

  def finish(self) -> Encoded:
    return Encoded(
      _stacked(self.leaves),
      _stacked(self.effective),
      _stacked(self.shifts),
      {'weights': self.facts, 'blocks': self.errors},
    )


class _Local:
  """One block while its weights are encoded."""

  def __init__(self, walker: _Walker, block):
    self.walker, self.block = walker, block
    self.traced = tracing.Traced(
      block.program, block.analysis, block.paths, lambda const: None
    )
    self.leaves = dict(block.take(walker.params))
    self.state: State = {
      s.id: jax.tree.map(
        lambda x: x[block.layer], dict(walker.ctx.state.get(s.id, {}))
      )
      for s in block.analysis.sites
    }
    self.encoded: set[str] = set()
    for site in block.analysis.sites:  # tied to an earlier block
      for path in walker.shared & set(site.paths):
        if (path, ()) in walker.leaves:
          self.leaves[path] = walker.leaves[path, ()]
          self.encoded.add(site.id)

  def wants(self, site) -> bool:
    found = self.walker.plan.sites[site.id].rule
    return found is not None

  def observe(self, ids: Sequence[str], stream, contexts) -> dict[str, Any]:
    """Statistics of the inputs of some sites on the quantized stream."""
    wanted = _Only(self.walker.observer, ids)
    handler = rewrites.observing(wanted, rewrites.deploying(self.walker.plan))
    chosen = frozenset(ids) | frozenset(self.encoded)

    @jax.jit
    def run(leaves, state, stream, context):
      _, stats = self._evaluator(
        leaves, _only_encoded(handler, wanted, self.encoded), chosen, wanted
      ).run([*stream, *context], state)
      return stats

    total: dict[str, Any] = {}
    for values, context in zip(stream, contexts, strict=True):
      stats = run(self._leaf_list(), self.state, values, context)
      total = {
        k: wanted.merge(None, total[k], v) if k in total else v
        for k, v in stats.items()
      }
    return total

  def encode(self, site, stat) -> None:
    """Turns one site's weight into codes."""
    plan, walker = self.walker.plan, self.walker
    rule = plan.sites[site.id].rule
    self.encoded.add(site.id)
    if rule is None or rule.weight is None or site.side is None:
      return
    if site.id in plan.effective:
      self._encode_effective(site, stat)
      return
    for path in site.paths:
      if path in walker.shared:
        if (path, ()) not in walker.leaves:
          self._store_shared(path)
        self.leaves[path] = walker.leaves[path, ()]
        continue
      layer = self.block.slices.get(path, ())
      target = Target(path, site, self.leaves[path], plan.leaves[path], layer)
      q = self._run(target, stat)
      self.leaves[path] = walker.leaves[path, layer] = q

  def _store_shared(self, path):
    """A parameter of several sites has no one Hessian: plain rounding."""
    walker = self.walker
    target = Target(path, None, walker.params[path], walker.plan.leaves[path])
    walker.leaves[path, ()] = self._run(target, None)

  def _encode_effective(self, site, stat):
    walker, plan = self.walker, self.walker.plan
    mine = frozenset([site.id])
    found = jax.jit(
      lambda ls: known.weights(self.traced, ls, mine, plan.folded & mine)
    )(self._dense_leaves())[site.id]
    layer = self.block.layer
    target = Target(
      site.id, site, found['weight'], plan.effective[site.id], layer
    )
    q = self._run(target, stat)
    walker.effective[site.id, layer] = q
    state = self.state.setdefault(site.id, {})
    state['effective'] = q
    if 'shift' in found:
      walker.shifts[site.id, layer] = found['shift']
      state['fold'] = {'shift': found['shift']}

  def _run(self, target, stat):
    q, facts = self.walker.encoder.encode(target, stat, self.walker.ctx.key)
    layer = ''.join(f'[{i}]' for i in target.layer)
    if facts:
      self.walker.facts[target.name + layer] = facts
    return q

  def advance(self, stream, contexts):
    """The quantized stream after the block."""
    handler = rewrites.deploying(self.walker.plan)
    chosen = frozenset(self.encoded)

    @jax.jit
    def run(leaves, state, stream, context):
      outs, _ = self._evaluator(leaves, handler, chosen).run(
        [*stream, *context], state
      )
      return tuple(outs)

    return [
      run(self._leaf_list(), self.state, values, context)
      for values, context in zip(stream, contexts, strict=True)
    ]

  def _evaluator(self, leaves, handler, chosen, monoid=None):
    return rewrites.evaluator_of(
      self.traced,
      leaves,
      chosen,
      handler,
      monoid=monoid,
      folded=self.walker.plan.folded & self.encoded,
    )

  def _leaf_list(self):
    return [self.leaves[p] for p in self.block.paths]

  def _dense_leaves(self):
    float_leaves = self.block.take(self.walker.params)
    return [float_leaves[p] for p in self.block.paths]


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


def _only_encoded(handler, observer, encoded):
  """Encoded sites run on codes, the others in float; wanted are observed."""
  plain = rewrites.observing(observer, rewrites.computing)

  def chosen(site, lhs, rhs, default, state):
    inner = handler if site.id in encoded else plain
    return inner(site, lhs, rhs, default, state)

  return chosen


def _groups(block) -> list[list[Any]]:
  """Sites in program order, those with the same input together."""
  traced = tracing.Traced(
    block.program, block.analysis, block.paths, lambda const: None
  )
  together = {i: ids for ids in pairs.shared_of_traced(traced) for i in ids}
  sites = {s.id: s for s in block.analysis.sites}
  groups, done = [], set()
  for name, site in sites.items():
    if name in done:
      continue
    ids = together.get(name, (name,))
    done |= set(ids)
    groups.append([sites[i] for i in ids] if len(ids) > 1 else [site])
  return groups


def _shared(plan: Plan) -> frozenset[str]:
  """Stored parameters that several products read."""
  uses: dict[str, int] = {}
  for site in plan.sites.values():
    for path in site.paths if site.derivation == 'leaf' else ():
      uses[path] = uses.get(path, 0) + 1
  return frozenset(p for p, n in uses.items() if n > 1 and p in plan.leaves)


def _stacked(found: Mapping[tuple[str, tuple[int, ...]], Any]) -> dict:
  """Layers of one stack joined along a leading loop axis."""
  by_name: dict[str, dict[tuple[int, ...], Any]] = {}
  for (name, layer), value in found.items():
    by_name.setdefault(name, {})[layer] = value
  return {name: _stack(layers) for name, layers in by_name.items()}


def _stack(layers: dict[tuple[int, ...], Any]) -> Any:
  if set(layers) == {()}:
    return layers[()]
  heads = sorted({layer[0] for layer in layers})
  parts = [
    _stack({k[1:]: v for k, v in layers.items() if k[0] == h}) for h in heads
  ]
  return jax.tree.map(lambda *xs: jnp.stack(xs), *parts)


def _error(floats, coded) -> float:
  """Squared error of the quantized stream relative to the float stream."""
  noise = signal = 0.0
  for a, b in zip(floats, coded, strict=True):
    x, y = a[0].astype(jnp.float32), b[0].astype(jnp.float32)
    noise += float(jnp.sum((x - y) ** 2))
    signal += float(jnp.sum(x**2))
  return noise / signal if signal else 0.0
