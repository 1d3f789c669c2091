"""The block walk: weights are encoded where their inputs are known.

Two streams go through the program's blocks: the float stream, what the float
model computes, and the quantized stream, what the model computes whose earlier
weights are codes already. In each block the sites are taken in the order of the
program, those with one input together: statistics of their inputs come from
the quantized stream, then their weights become codes, then the next see them.
When all are, tuners change what is left in float, and both streams move on.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from quantlab.calibration.batches import checked, same_shapes
from quantlab.core import QTensor
from quantlab.core.tree import named_leaves
from quantlab.graph import blocks as blocks_lib
from quantlab.graph import known, pairs, tracing
from quantlab.plan import Plan
from quantlab.ptq.local import Local, OutputMoments
from quantlab.ptq.resume import Checkpoints, Entries
from quantlab.ptq.streams import Store
from quantlab.ptq.transform import Context, Encoder, Target, Tuner


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Result of encoding.

  Attributes:
    leaves: codes by parameter path.
    effective: codes by site id.
    shifts: shift of a folded BatchNorm, by site id.
    params: float parameters by path, as tuners left them.
    biases: what tuners added to products, by site id.
    facts: what the members reported: by weight, by block.
  """

  leaves: dict[str, QTensor]
  effective: dict[str, QTensor]
  shifts: dict[str, jax.Array]
  params: dict[str, Any]
  biases: dict[str, jax.Array]
  facts: dict[str, Any]


def encode_all(ctx: Context, encoder: Encoder) -> Encoded:
  """Encodes every weight at once, for a member that needs no data."""
  plan, traced = ctx.plan, ctx.traced
  params = dict(named_leaves(ctx.params))
  leaves = [params[p] for p in traced.paths]
  found = jax.jit(
    lambda ls: known.weights(traced, ls, frozenset(plan.effective), plan.folded)
  )(leaves)
  coded, effective = {}, {}
  for path, storage in plan.leaves.items():
    target = Target(path, None, params[path], storage)
    coded[path], _ = encoder(target, None, ctx.key)
  for name, stat in found.items():
    target = Target(name, None, stat['weight'], plan.effective[name])
    effective[name], _ = encoder(target, None, ctx.key)
  shifts = {k: s['shift'] for k, s in found.items() if 'shift' in s}
  return Encoded(coded, effective, shifts, params, {}, {})


def encode_blocks(
  ctx: Context,
  encoder: Encoder,
  tuners: Sequence[Tuner] = (),
  store: Store | None = None,
  checkpoints: Checkpoints | None = None,
) -> Encoded:
  """Encodes weight by weight along the block walk.

  Args:
    ctx: the model, prepared.
    encoder: makes the codes.
    tuners: change float parameters of each block that is encoded.
    store: where streams lie; in memory by default.
    checkpoints: of the blocks that are done.
  """
  walker = _Walker(ctx, encoder, tuners, store or Store(None, 0))
  parts = blocks_lib.layers(blocks_lib.of_traced(ctx.traced))
  walker.gains -= _of_several(parts)
  for index, block in enumerate(parts):
    done = checkpoints and checkpoints.read(index, ctx.plan)
    depth = index / max(len(parts) - 1, 1)
    entries, facts = walker.block(block, depth, done or None)
    if checkpoints and not done:
      checkpoints.write(index, entries, facts)
    logging.info(
      'block %d of %d, %s: relative error %.3g',
      *(index + 1, len(parts), block.name, facts['block']['relative_error']),
    )
  return walker.finish()


class _Walker:
  """Takes block after block; holds codes as they are made."""

  def __init__(self, ctx: Context, encoder: Encoder, tuners, store: Store):
    self.ctx, self.encoder, self.tuners = ctx, encoder, tuners
    self.params = dict(named_leaves(ctx.params))
    self.shared = _shared(ctx.plan)
    self.gains = _gains(ctx.traced) if tuners else frozenset()
    for tuner in tuners:
      if tuner.check is not None:
        tuner.check(ctx, self.gains)
    # By (kind, name, layer): a layer of a stack is an entry of its own.
    self.made: Entries = {}
    self.facts: list[dict[str, Any]] = []
    self.floats, self.coded = store.stream(), store.stream()
    for _ in same_shapes(ctx.batches):
      self.floats.append(())
      self.coded.append(())

  def block(
    self, block, depth: float, done: tuple[Entries, dict] | None
  ) -> tuple[Entries, dict[str, Any]]:
    """Encodes one block, or takes it as done; moves both streams through it.

    Returns:
      What its weights became, and what was reported of it.
    """
    local = Local(block, self.ctx, self.made, self.shared)
    weights: dict[str, Any] = {}
    if done:
      local.restore(done[0])
    else:
      for group in _groups(block):
        self._group(local, group, weights)
    # Before the float stream moves on: outputs of both are compared.
    tuned = done[1]['tuned'] if done else self._tune(local, depth)
    for i, context in self._contexts(block):
      self.floats[i] = local.float_step(self.floats[i], context)
    noise = signal = 0.0
    for i, context in self._contexts(block):
      self.coded[i] = local.coded_step(self.coded[i], context)
      a, b = _distance(self.floats[i][0], self.coded[i][0])
      noise, signal = noise + float(a), signal + float(b)
    facts = {
      'weights': done[1]['weights'] if done else weights,
      'block': {
        'block': block.name,
        'relative_error': noise / signal if signal else 0.0,
      },
      'tuned': tuned,
    }
    self.made |= local.entries
    self.facts.append(facts)
    return local.entries, facts

  def _group(self, local: Local, group, weights: dict[str, Any]) -> None:
    """Sites with one input: statistics, then codes."""
    chosen = [s for s in group if local.wants(s)]
    if not chosen:
      return
    found = self._statistics(local, [s.id for s in chosen])
    for site in chosen:
      weights |= local.encode(site, found.get(site.id), self.encoder)

  def _statistics(self, local: Local, ids: Sequence[str]) -> dict[str, Any]:
    """What the encoder asks for of the inputs of some sites."""
    if self.encoder.observe is None:
      return {}
    observer = self.encoder.observe(self.ctx.plan)
    observed = local.observed(observer, ids)
    total: dict[str, Any] = {}
    for i, context in self._contexts(local.block):
      for k, v in observed(self.coded[i], context).items():
        total[k] = observer.merge(None, total[k], v) if k in total else v
      jax.block_until_ready(total)  # one batch at a time, as in a stream
    return total

  def _tune(self, local: Local, depth: float) -> dict[str, Any]:
    return {
      tuner.name: tuner.run(_BlockTuning(self, local, depth))
      for tuner in self.tuners
    }

  def _contexts(self, block) -> Iterator[tuple[int, Any]]:
    for i, args in enumerate(checked(self.ctx.batches)):
      yield i, block.context(*args)

  def finish(self) -> Encoded:
    kinds: dict[str, dict[tuple[str, tuple[int, ...]], Any]]
    kinds = collections.defaultdict(dict)
    for (kind, name, layer), value in self.made.items():
      kinds[kind][name, layer] = value
    params = dict(self.params)
    for (path, layer), value in kinds['params'].items():
      params[path] = params[path].at[layer].set(value) if layer else value
    weights = {
      k: v for facts in self.facts for k, v in facts['weights'].items()
    }
    blocks = [
      {**facts['block'], **({'tuned': t} if (t := facts['tuned']) else {})}
      for facts in self.facts
    ]
    return Encoded(
      _stacked(kinds['leaves']),
      _stacked(kinds['effective']),
      _stacked(kinds['shifts']),
      params,
      _stacked(kinds['biases']),
      {'weights': weights, 'blocks': blocks},
    )


class _BlockTuning:
  """The block at hand, see `Tuning`."""

  def __init__(self, walker: _Walker, local: Local, depth: float):
    self._walker, self._local, self.depth = walker, local, depth
    self.name = local.block.name
    self.gains = [p for p in local.block.paths if p in walker.gains]
    self.groups = [
      found
      for group in _groups(local.block)
      if (found := [s for s in group if local.tunable(s)])
    ]
    self.apply = local.apply
    self.set_leaf = local.set_leaf
    self.add_bias = local.add_bias
    self.scale_output = local.scale_output
    self.batches = self

  @property
  def leaves(self) -> dict[str, Any]:
    return dict(self._local.leaves)

  def __iter__(self) -> Iterator[tuple[Any, Any, Any]]:
    walker, local = self._walker, self._local
    for i, context in walker._contexts(local.block):
      target = local.float_step(walker.floats[i], context)
      yield walker.coded[i], context, target

  def moments(self, sites) -> dict[str, Any]:
    walker, local = self._walker, self._local
    ids = [s.id for s in sites]
    observer = OutputMoments(ids)
    sides = (
      (walker.floats, local.float_observed(observer, ids)),
      (walker.coded, local.observed(observer, ids)),
    )
    totals: list[dict[str, Any]] = []
    for stream, observed in sides:
      total: dict[str, Any] = {}
      for i, context in walker._contexts(local.block):
        for k, v in observed(stream[i], context).items():
          total[k] = observer.merge(None, total[k], v) if k in total else v
        jax.block_until_ready(total)
      totals.append({k: observer.result(v) for k, v in total.items()})
    return {k: (totals[0][k], totals[1][k]) for k in ids}


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


def _of_several(parts) -> frozenset[str]:
  """Parameters, or layers of them, that several blocks read."""
  uses = collections.Counter(
    (path, block.layer) for block in parts for path in block.paths
  )
  return frozenset(path for (path, _), n in uses.items() if n > 1)


def _shared(plan: Plan) -> frozenset[str]:
  """Stored parameters that several products read."""
  uses: dict[str, int] = {}
  for site in plan.sites.values():
    for path in site.paths if site.derivation == 'leaf' else ():
      uses[path] = uses.get(path, 0) + 1
  return frozenset(p for p, n in uses.items() if n > 1 and p in plan.leaves)


def _gains(traced: tracing.Traced) -> frozenset[str]:
  """Paths of norm gains and biases."""
  return frozenset(
    m.path
    for p in pairs.of_traced(traced)
    if p.kind == 'norm'
    for m in p.producers
  )


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


@jax.jit
def _distance(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Squared error of b, and squared norm of a."""
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return jnp.sum((a - b) ** 2), jnp.sum(a**2)
